// What the service is at, and how much it has to do: asked for every few seconds while the page is seen.

const WAIT_MS = { loading: 1000, ready: 3000, keyed: 15000 }; // a key may have a quota: ask it for little
const PREFIX = "megatron_gpt2_";

export class Load {
  #service;
  #told;
  #timer = null;
  #shown = null; // the load that was told last
  #last = null; // generated tokens, and when
  #metricsAllowed = true;
  #busy = false;

  /** `told` is called with {ready, phase, progress, load}; `load` is null where it is not to be seen. */
  constructor(service, told) {
    this.#service = service;
    this.#told = told;
    this.keysOn = false;
    this.running = false; // the page itself has a request open
    document.addEventListener("visibilitychange", () => this.refresh());
  }

  /** Asks now, and from then on. What was not allowed may be with another key. */
  refresh() {
    this.#metricsAllowed = true;
    clearTimeout(this.#timer);
    this.#timer = null;
    if (!document.hidden && !this.#busy) this.#ask();
  }

  get #keyUsed() {
    return this.keysOn && this.#service.key !== null && this.#metricsAllowed;
  }

  async #ask() {
    this.#busy = true;
    let wait = WAIT_MS.loading;
    try {
      const state = await this.#readiness();
      const load = state.ready ? await this.#metrics() : null;
      if (state.ready) wait = this.#keyUsed ? WAIT_MS.keyed : WAIT_MS.ready;
      this.#told({ ...state, load });
    } finally {
      this.#busy = false;
      if (!document.hidden) this.#timer = setTimeout(() => this.#ask(), wait);
    }
  }

  async #readiness() {
    try {
      const { phase } = await this.#service.get("readyz");
      return { ready: true, phase, progress: 1 };
    } catch (error) {
      if (error.status === 0) return { ready: false, phase: "unreachable", progress: 0 };
      const { phase = "unavailable", progress = 0 } = error.body;
      return { ready: error.status !== 503, phase, progress }; // where a proxy hides it, asking tells
    }
  }

  async #metrics() {
    if (!this.#metricsAllowed || (this.keysOn && this.#service.key === null)) return null;
    if (this.keysOn && this.running) return this.#shown; // of the requests that a key may have open it would be one
    let text;
    try {
      text = await this.#service.get("metrics", { as: "text" });
    } catch (error) {
      this.#metricsAllowed = ![401, 403, 404].includes(error.status);
      this.#shown = null;
      return null;
    }
    const now = performance.now();
    const generated = sum(text, "generated_tokens_total");
    const before = this.#last;
    this.#last = { generated, now };
    // After a restart of the process the count begins anew.
    const rate = before && generated >= before.generated ? (1000 * (generated - before.generated)) / (now - before.now) : 0;
    this.#shown = {
      running: sum(text, "requests_running"),
      waiting: sum(text, "requests_waiting"),
      kv: sum(text, "kv_cache_usage_ratio") / Math.max(1, samples(text, "kv_cache_usage_ratio").length),
      rate,
    };
    return this.#shown;
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
