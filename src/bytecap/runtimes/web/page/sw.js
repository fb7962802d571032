// Serves the page without a connection. The page itself comes from the server where there is one, so that a new version
// is seen; what it has checked and kept comes from the cache.
const PREFIX = "bytecap " + new URL("./", self.location.href).pathname + " ";

async function kept(request) {
  for (const name of await caches.keys()) {
    const found = name.startsWith(PREFIX) && await (await caches.open(name)).match(request, { ignoreSearch: true });
    if (found) return found;
  }
}

async function answered(request) {
  const fresh = request.mode === "navigate" || new URL(request.url).pathname.endsWith("/app.js");
  if (!fresh) return await kept(request) ?? fetch(request);
  try {
    return await fetch(request);
  } catch (error) {
    const found = await kept(request.mode === "navigate" ? "./" : request);
    if (found) return found;
    throw error;
  }
}

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => {
  const { request } = event;
  if (request.method === "GET" && new URL(request.url).origin === self.location.origin) event.respondWith(answered(request));
});
