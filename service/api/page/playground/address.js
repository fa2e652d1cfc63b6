// The state of the page in its address's fragment, which no server sees: to be kept and handed on. Never the key.

export const MAX_PROMPT = 2000; // characters; a longer one stays out
const NOT_SHARED = new Set(["cache_salt", "user"]);
const DELAY_MS = 300; // browsers let a page write its address a few times a second at most

export class Address {
  #timer = null;
  #state = null; // to be written

  /** {prompt, panes}: prompt is null where there is none, panes has what is typed in each. */
  read() {
    const found = new URLSearchParams(window.location.hash.slice(1));
    const panes = [{}];
    if (found.has("compare")) panes.push({});
    for (const [name, raw] of found) {
      const [, second, field] = /^(b\.)?(\w+)$/.exec(name) ?? [];
      const pane = panes[second ? 1 : 0];
      if (pane && field && !["prompt", "compare"].includes(field)) pane[field] = raw;
    }
    return { prompt: found.get("prompt"), panes };
  }

  /** Writes the same, a moment after the last call. */
  write(state) {
    clearTimeout(this.#timer);
    this.#state = state;
    this.#timer = setTimeout(() => this.flush(), DELAY_MS);
  }

  /** Writes what is to be written at once. */
  flush() {
    if (this.#state === null) return;
    const { prompt, panes } = this.#state;
    this.#state = null;
    const state = new URLSearchParams();
    if (prompt.length <= MAX_PROMPT) state.set("prompt", prompt);
    if (panes.length > 1) state.set("compare", "");
    panes.forEach((typed, place) => {
      for (const [name, raw] of Object.entries(typed)) {
        if (!NOT_SHARED.has(name)) state.set(place ? `b.${name}` : name, raw);
      }
    });
    history.replaceState(null, "", `#${state}`);
  }
}
