// What the service is at, and how much it has to do: asked for every few seconds while the page is seen.

const WAIT_MS = { loading: 1000, ready: 3000, keyed: 15000 }; // a key may have a quota: ask it for little
const PREFIX = "megatron_gpt2_";

export class Load {
  #service;
  #told;
  #timer = null;
  #last = null; // generated tokens, and when
  #metricsAllowed = true;
  #busy = false;

  /** `told` is called with {ready, phase, progress, load}; `load` is null where it is not to be seen. */
  constructor(service, told) {
    this.#service = service;
    this.#told = told;
    this.keysOn = false;
    document.addEventListener("visibilitychange", () => this.refresh());
  }

  /** Asks now, and from then on. What was not allowed may be with another key. */
  refresh() {
    this.#metricsAllowed = true;
    clearTimeout(this.#timer);
    this.#timer = null;
    if (!document.hidden && !this.#busy) this.#ask();
  }

  async #ask() {
    this.#busy = true;
    const state = await this.#readiness();
    const load = await this.#metrics();
    this.#busy = false;
    this.#told({ ...state, load });
    if (document.hidden) return;
    const wait = !state.ready ? WAIT_MS.loading : this.keysOn && load ? WAIT_MS.keyed : WAIT_MS.ready;
    this.#timer = setTimeout(() => this.#ask(), wait);
  }

  async #readiness() {
    try {
      const { phase } = await (await this.#service.ask("readyz")).json();
      return { ready: true, phase, progress: 1 };
    } catch (error) {
      if (error.status === 0) return { ready: false, phase: "unreachable", progress: 0 };
      const { phase = "unavailable", progress = 0 } = error.body;
      return { ready: error.status !== 503, phase, progress }; // where a proxy hides it, asking tells
    }
  }

  async #metrics() {
    if (!this.#metricsAllowed || (this.keysOn && this.#service.key === null)) return null;
    let text;
    try {
      text = await (await this.#service.ask("metrics")).text();
    } catch (error) {
      this.#metricsAllowed = error.status === 0 || error.status === 503;
      return null;
    }
    const now = performance.now();
    const generated = sum(text, "generated_tokens_total");
    const before = this.#last;
    this.#last = { generated, now };
    // After a restart of the process the count begins anew.
    const rate = before && generated >= before.generated ? (1000 * (generated - before.generated)) / (now - before.now) : 0;
    return {
      running: sum(text, "requests_running"),
      waiting: sum(text, "requests_waiting"),
      kv: sum(text, "kv_cache_usage_ratio") / Math.max(1, samples(text, "kv_cache_usage_ratio").length),
      rate,
    };
  }
}

/** The values of a metric: of several engines it has one each. */
function samples(text, name) {
  const line = new RegExp(`^${PREFIX}${name}(?:\\{[^}]*\\})? (\\S+)`, "gm");
  return [...text.matchAll(line)].map(([, value]) => Number(value));
}

function sum(text, name) {
  return samples(text, name).reduce((total, value) => total + value, 0);
}
