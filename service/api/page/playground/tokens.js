// The tokens of one choice on the page: their text, each shaded by how likely it was. Used by pane.js.

const MAX_BITS = 10; // of surprise, for the full shade: one in a thousand

/**
 * Text that grows. Whatever is appended is drawn at the next frame, all of a frame at once.
 *
 * `element`'s text is the choice's text at any time. One token can be reached with Tab, from which arrow keys go to the
 * others; only that one is a button, so that a screen reader reads the others as text.
 */
export class Tokens {
  #characters = []; // as the server counts them: code points
  #entries = [];
  #spans = [];
  #frame = null;
  #current = null;
  #numDrawn = 0;

  /** `open` is called with the index of a token that was clicked or entered. */
  constructor(element, open) {
    this.element = element;
    element.addEventListener("click", (event) => {
      const index = this.#spans.indexOf(event.target.closest(".token"));
      if (index < 0 || !document.getSelection().isCollapsed) return; // text is being marked
      this.#move(index);
      open(index);
    });
    element.addEventListener("keydown", (event) => this.#key(event, open));
  }

  get text() {
    return this.#characters.join("");
  }

  /** The entry of each token: its `name`, `logprob`, `top` (names to log-probabilities) and `offset` in the text. */
  get entries() {
    return this.#entries;
  }

  span(index) {
    return this.#spans[index];
  }

  textOf(index) {
    return this.#characters.slice(this.#entries[index].offset, this.#entries[index + 1]?.offset).join("");
  }

  /** What a chunk has for this choice; `scored` says that there will be log-probabilities for all of its text. */
  append({ text, logprobs }, { scored, base }) {
    const offset = this.#characters.length;
    for (const character of text) this.#characters.push(character); // a spread of a megabyte overflows the stack
    if (scored) {
      logprobs?.tokens.forEach((name, place) => {
        const entry = {
          name,
          logprob: logprobs.token_logprobs[place],
          top: logprobs.top_logprobs?.[place] ?? null,
          offset: base + logprobs.text_offset[place],
        };
        this.#entries.push(entry);
      });
    } else if (text) {
      this.#entries.push({ name: null, logprob: null, top: null, offset });
    }
    this.#frame ??= requestAnimationFrame(() => this.draw());
  }

  /** Keeps the first tokens, then adds one that was chosen by hand, which gets the focus. Returns the number of characters. */
  take(index, name) {
    const { offset, top } = this.#entries[index];
    this.#characters.length = offset;
    this.#entries.length = index;
    this.#spans.splice(index).forEach((span) => span.remove());
    this.#numDrawn = Math.min(this.#numDrawn, index);
    for (const character of name) this.#characters.push(character);
    this.#entries.push({ name, logprob: top[name], top, offset, taken: true });
    if (this.#current !== null && this.#current >= index) this.#current = null;
    this.draw();
    this.#move(index);
    this.#spans[index].focus({ preventScroll: true });
    return this.#characters.length;
  }

  /** Shows all that there is. The last token shown may have gone too far: text arrives before the next one's entry. */
  draw() {
    if (this.#frame !== null) cancelAnimationFrame(this.#frame);
    this.#frame = null;
    const fresh = document.createDocumentFragment();
    for (let index = Math.max(0, this.#numDrawn - 1); index < this.#entries.length; index += 1) {
      const text = this.textOf(index);
      if (index < this.#numDrawn) {
        if (this.#spans[index].textContent !== text) fill(this.#spans[index], this.#entries[index], text);
      } else {
        const span = document.createElement("span");
        fill(span, this.#entries[index], text);
        this.#spans.push(span);
        fresh.append(span);
      }
    }
    this.#numDrawn = this.#entries.length;
    this.element.append(fresh);
    if (this.#current === null && this.#spans.length && this.#entries[0].name !== null) this.#move(0);
  }

  #key(event, open) {
    if (event.ctrlKey || event.metaKey || event.altKey || this.#current === null) return;
    const numScored = this.#entries.findLastIndex(({ name }) => name !== null) + 1; // what follows is text alone
    const last = Math.min(numScored, this.#spans.length) - 1;
    const target = {
      ArrowRight: Math.min(this.#current + 1, last),
      ArrowLeft: Math.max(this.#current - 1, 0),
      Home: 0,
      End: last,
    }[event.key];
    if (target !== undefined) {
      this.#move(target);
      this.#spans[target].focus();
    } else if (event.key === "Enter" || event.key === " ") {
      open(this.#current);
    } else {
      return;
    }
    event.preventDefault();
  }

  /** Makes a token the one that Tab reaches. */
  #move(index) {
    const before = this.#spans[this.#current];
    if (before) ["role", "tabindex", "aria-label", "aria-haspopup"].forEach((name) => before.removeAttribute(name));
    this.#current = index;
    const { name, logprob } = this.#entries[index];
    if (name === null) return;
    const span = this.#spans[index];
    span.setAttribute("role", "button");
    span.setAttribute("tabindex", "0");
    span.setAttribute("aria-haspopup", "dialog");
    span.setAttribute("aria-label", `${this.textOf(index)} ${logprob === null ? "" : percent(logprob)}`.trim());
  }
}

function fill(span, { name, logprob, taken }, text) {
  span.textContent = text;
  span.className = name === null ? "text" : taken ? "token taken" : "token";
  if (name === null) return;
  if (text === "") span.dataset.mark = name === "<|endoftext|>" ? name : ""; // a piece of a character
  else if (/^[^\S\n]*\n+$/.test(text)) span.dataset.mark = "↵";
  else delete span.dataset.mark;
  const bits = logprob === null ? 0 : -logprob / Math.LN2;
  span.style.setProperty("--surprise", Math.min(1, bits / MAX_BITS).toFixed(3));
}

/** A log-probability as a share of a hundred. */
export function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  if (share < 0.01) return "under 0.01 %";
  return `${share.toFixed(share < 0.1 ? 2 : share < 99.95 ? 1 : 0)} %`;
}
