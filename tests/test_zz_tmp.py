import bytecap, pytest, time
from conftest import SMALL
from bytecap import trim
from bytecap.methods.waterfill import Planner
def test_x(model_directory, texts, monkeypatch):
    d = model_directory("rotary")
    orig = trim.fit_to_cap
    def spy(planner, state, tables, size, budget):
        print("enter est rate", state.rate, "budget", budget)
        osettle = planner.settle
        def settle(steps, refit=True):
            s = osettle(steps, refit=refit); print("   settle", s.rate); return s
        planner.settle = settle
        def size2(s, t):
            v = size(s, t); print("size", v); return v
        return orig(planner, state, tables, size2, budget)
    import bytecap.methods.default as df
    monkeypatch.setattr(df, "fit_to_cap", spy)
    s0 = Planner.search
    def search(self, *a, **k):
        c, st = s0(self, *a, **k); print("search", a[1], c, st.rate, k); return c, st
    monkeypatch.setattr(Planner, "search", search)
    for b in (28126,):
            try:
                r = bytecap.fit(d, b, calibration=texts["calib"], evaluation=texts["val"], **SMALL)
                print(b, r.report["slack_bytes"], r.report["lossless"], r.report["kl_nats"], r.report["plan"])
            except Exception as e: print(b, repr(e))
