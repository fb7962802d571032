// Downloads the runtime and the model once, checks both against the hashes in the page, keeps them, generates text.
const at = (id) => document.getElementById(id);
const made = JSON.parse(at("made").textContent);
const PREFIX = "bytecap " + new URL("./", location.href).pathname + " ";
const file = (end) => made.files.find((f) => f.name.endsWith(end));
const [script, wasm, model] = [".js.pack", ".wasm.pack", ".gguf"].map(file);
const CACHE = PREFIX + model.sha256;
const whole = made.files.reduce((n, f) => n + f.bytes, 0);
const size = (n) => n.toLocaleString("en");
let arrived = 0, engine = null, stopped = false, said = [];
const chatting = () => Boolean(made.chat) && at("chat").checked;

class Trouble extends Error {}

function state(word, text) {
  document.body.dataset.state = word;
  if (text !== undefined) at("state").textContent = text;
}

function fail(error) {
  at("trouble").textContent = error instanceof Trouble ? error.message : `Something went wrong: ${error?.message ?? error}`;
  at("trouble").hidden = false;
  at("bar").hidden = true;
  at("start").textContent = "Try again";
  at("start").hidden = engine !== null;
  state("failed", "The model is not running.");
}

function advance(bytes) {
  arrived += bytes;
  at("bar").value = arrived / whole;
  at("state").textContent = `${size(arrived)} of ${size(whole)} bytes`;
}

async function digest(bytes) {
  const found = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return [...found].map((b) => b.toString(16).padStart(2, "0")).join("");
}

// The bytes of a response of a known length, counted as they come.
async function received(response, f) {
  const bytes = new Uint8Array(f.bytes), reader = response.body.getReader();
  let here = 0;
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch {
      throw new Trouble(`The download of ${f.name} broke off after ${size(here)} of ${size(f.bytes)} bytes.`);
    }
    if (part.done) break;
    if (here + part.value.length > f.bytes) {
      reader.cancel().catch(() => {});
      throw new Trouble(`${f.name} is longer than the ${size(f.bytes)} bytes that this page was made for.`);
    }
    bytes.set(part.value, here);
    here += part.value.length;
    advance(part.value.length);
  }
  if (here < f.bytes)
    throw new Trouble(`${f.name} is cut short: ${size(here)} of ${size(f.bytes)} bytes arrived.`);
  return bytes;
}

// A file's checked bytes: kept ones if they are sound, else from the server.
async function checked(f, cache) {
  const kept = await cache?.match(f.name).catch(() => undefined);
  if (kept) {
    const bytes = new Uint8Array(await kept.arrayBuffer());
    if (bytes.length === f.bytes && await digest(bytes) === f.sha256) {
      advance(f.bytes);
      return bytes;
    }
    await cache.delete(f.name);
  }
  let response;
  try {
    response = await fetch(f.name, { cache: "no-cache" });
  } catch {
    throw new Trouble(`${f.name} could not be downloaded: there is no connection to the server.`);
  }
  if (!response.ok) throw new Trouble(`${f.name} could not be downloaded: the server answered ${response.status}.`);
  const bytes = await received(response, f), found = await digest(bytes);
  if (found !== f.sha256)
    throw new Trouble(`${f.name} was changed on the way: its SHA-256 is ${found}, and this page was made for ${f.sha256}.`);
  await cache?.put(f.name, new Response(bytes)).catch(() => {});
  return bytes;
}

async function unpacked(bytes, type) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return URL.createObjectURL(new Blob([await new Response(stream).arrayBuffer()], { type }));
}

async function opened() {
  try {
    for (const name of await caches.keys())
      if (name.startsWith(PREFIX) && name !== CACHE) await caches.delete(name);
    return await caches.open(CACHE);
  } catch {
    return null; // no storage, as in some private windows: the page works while it is open
  }
}

// Keep the page itself; its bytes are in the browser's own cache already.
async function keep(cache) {
  try {
    for (const name of ["./", "app.js"]) await cache.put(name, await fetch(name, { cache: "force-cache" }));
    await navigator.serviceWorker.register("sw.js");
    await navigator.serviceWorker.ready;
    return (await Promise.all(made.files.map((f) => cache.match(f.name)))).every(Boolean);
  } catch {
    return false;
  }
}

async function start() {
  at("trouble").hidden = true;
  at("start").hidden = true;
  at("bar").hidden = false;
  arrived = 0;
  state("loading", `0 of ${size(whole)} bytes`);
  try {
    const cache = await opened(), bytes = {};
    for (const f of [script, wasm, model]) bytes[f.name] = await checked(f, cache);
    state("loading", "Starting the model.");
    const { Wllama } = await import(await unpacked(bytes[script.name], "text/javascript"));
    const place = await unpacked(bytes[wasm.name], "application/wasm"), quiet = () => {};
    const logger = { debug: quiet, log: quiet, warn: quiet, error: quiet };
    const fresh = new Wllama({ "single-thread/wllama.wasm": place }, { suppressNativeLog: true, logger });
    const seed = crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
    await fresh.loadModel([new Blob([bytes[model.name]])], { n_threads: 1, n_ctx: made.context, seed });
    engine = fresh;
    at("bar").hidden = true;
    at("form").hidden = false;
    const kept = await keep(cache);
    document.body.dataset.kept = kept;
    state("ready", `Ready: ${size(whole)} bytes, checked. ` + (kept
      ? "This page now works without a connection."
      : "This browser does not keep files for this page: it works until it is closed."));
  } catch (error) {
    fail(error);
  }
}

// The whole of a conversation as the model's chat template writes it: texts around messages, a user's first and last.
function conversation(messages) {
  const { before, asked, answered } = made.chat;
  return before + messages.map((m, i) => m + (i % 2 ? answered : asked)).join("");
}

function line(who, text) {
  const item = document.createElement("li");
  item.className = who;
  item.setAttribute("aria-label", who === "user" ? "You" : "Model");
  item.textContent = text;
  at("talk").append(item);
  return item;
}

function anew() {
  said = [];
  at("talk").replaceChildren();
  at("talk").hidden = at("anew").hidden = !chatting();
  at("modes").hidden = !made.chat;
  at("text").hidden = true;
  at("ask").textContent = chatting() ? "Your message" : "Text to continue";
  at("go").textContent = chatting() ? "Send" : "Generate";
  at("trouble").hidden = true;
  at("prompt").value = chatting() ? "" : "The ";
}

function trouble(text) {
  at("trouble").textContent = text;
  at("trouble").hidden = false;
}

// What is to be sent to the model, and where its words go: (prompt, a function that shows them, one that keeps them).
function asked() {
  const words = at("prompt").value;
  if (!chatting()) {
    at("text").hidden = false;
    const show = (text) => { at("text").textContent = words + text; };
    return [words, show, () => {}];
  }
  const message = words.trim(), control = made.chat.control.find((c) => message.includes(c));
  if (!message) return trouble("There is no message yet.");
  if (control) return trouble(`A message may not hold ${control}: it is a control word of this model.`);
  const mine = line("user", message), answer = line("model", ""), before = said;
  at("prompt").value = "";
  const keep = (text) => {
    if (text !== null) said = [...before, message, text.trim()];
    else {
      mine.remove();
      answer.remove();
      at("prompt").value = words;
    }
  };
  return [conversation([...before, message]), (text) => { answer.textContent = text.trim(); }, keep];
}

async function generate(event) {
  event.preventDefault();
  at("trouble").hidden = true;
  const what = asked();
  if (!what) return;
  const [prompt, show, keep] = what, nPredict = Math.max(1, Math.floor(at("most").valueAsNumber || 64));
  const temp = Math.max(0, at("temperature").valueAsNumber || 0), begun = performance.now();
  let count = 0, text = "";
  stopped = false;
  for (const name of ["go", "chat", "anew"]) at(name).disabled = true;
  at("stop").disabled = false;
  show("");
  state("running");
  try {
    await engine.createCompletion(prompt, {
      nPredict, sampling: temp > 0 ? { temp } : { temp: 0, top_k: 1 },
      onNewToken: (token, piece, now, { abortSignal }) => {
        count += 1;
        text = now;
        show(text);
        if (stopped) abortSignal();
      },
    });
  } catch (error) {
    const full = /context|cache|decode/i.test(String(error?.message));
    trouble(full
      ? `The model's context of ${size(made.context)} tokens is full: ${chatting() ? "begin a new conversation." : "shorten the text."}`
      : `Generation stopped: ${error?.message ?? error}`);
  }
  keep(count ? text : null);
  const seconds = (performance.now() - begun) / 1000;
  at("speed").textContent = `${count} tokens in ${seconds.toFixed(1)} s`;
  for (const name of ["go", "chat", "anew"]) at(name).disabled = false;
  at("stop").disabled = true;
  state("ready");
}

at("chat").addEventListener("change", anew);
at("anew").addEventListener("click", anew);
anew();
at("form").addEventListener("submit", generate);
at("stop").addEventListener("click", () => { stopped = true; });
at("start").addEventListener("click", start);
if (!globalThis.crypto?.subtle) {
  fail(new Trouble("This page can check what it downloads only over https or from localhost."));
  at("start").hidden = true;
} else if (!globalThis.WebAssembly || !globalThis.DecompressionStream) {
  fail(new Trouble("This browser is too old: it lacks WebAssembly or DecompressionStream."));
  at("start").hidden = true;
} else {
  const kept = await caches.has(CACHE).then((has) => has && caches.open(CACHE)).catch(() => null);
  if (kept && await kept.match(model.name)) start();
  else {
    at("start").textContent = `Download ${size(whole)} bytes and start`;
    at("start").hidden = false;
    state("idle", `Model and runtime: ${size(whole)} bytes, once.`);
  }
}
