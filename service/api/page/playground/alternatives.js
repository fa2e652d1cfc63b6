// The tokens that could have stood in a token's place, with their probabilities. One popover, used by every pane.
import { percent } from "./tokens.js";

const GAP = 6; // pixels between the token and the popover
const END_OF_TEXT = "<|endoftext|>";

export class Alternatives {
  #element;
  #token = null;

  constructor(element) {
    this.#element = element;
    element.addEventListener("keydown", (event) => this.#key(event));
    element.addEventListener("toggle", ({ newState }) => {
      if (newState === "open") return;
      this.#token?.classList.remove("open");
      if (document.activeElement === document.body) this.#token?.focus({ preventScroll: true });
    });
  }

  get isOpen() {
    return this.#element.matches(":popover-open");
  }

  /** Opens beside `token`, the element of an entry; `take` is called with the name of an alternative that is chosen. */
  open(token, entry, take) {
    this.close();
    this.#token = token;
    this.#element.replaceChildren(...this.#content(entry, take));
    token.classList.add("open");
    this.#element.showPopover();
    // A token's first box may be a lone space at the end of the line before.
    this.#place([...token.getClientRects()].at(-1) ?? token.getBoundingClientRect());
    (this.#element.querySelector("button.here") ?? this.#element.querySelector("button"))?.focus();
  }

  close() {
    if (this.isOpen) this.#element.hidePopover();
  }

  #content({ name, logprob, top }, take) {
    const head = document.createElement("p");
    head.className = "about";
    const shown = document.createElement("code");
    shown.textContent = quoted(name);
    head.append(shown, logprob === null ? " starts the text" : ` ${percent(logprob)}`);
    const list = document.createElement("ul");
    const ranked = Object.entries(top ?? {}).sort(([, one], [, other]) => other - one);
    for (const [other, value] of ranked) list.append(this.#row(other, value, other === name, take));
    const rest = 1 - ranked.reduce((sum, [, value]) => sum + Math.exp(value), 0);
    const note = document.createElement("p");
    note.className = "note";
    note.textContent = ranked.length
      ? `All others: ${percent(Math.log(Math.max(rest, 0)))}. These are the model's own, before temperature and filters. ` +
        "Choose one, and the text goes on from it."
      : "Ask for logprobs of 1 or more to see alternatives.";
    const close = document.createElement("button");
    Object.assign(close, { type: "button", className: "close", textContent: "Close" });
    close.addEventListener("click", () => this.#element.hidePopover());
    return [head, list, note, close];
  }

  #row(name, logprob, here, take) {
    const item = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    button.className = here ? "row here" : "row";
    button.style.setProperty("--share", Math.exp(logprob).toFixed(4));
    const shown = document.createElement("code");
    shown.textContent = quoted(name);
    const share = document.createElement("span");
    share.textContent = percent(logprob);
    button.append(shown, share);
    // A piece of a character cannot be sent as text, and after the end of a text nothing of it goes on.
    const usable = !name.startsWith("bytes:") && name !== END_OF_TEXT;
    button.setAttribute("aria-label", `${quoted(name)}, ${percent(logprob)}${here ? ", taken" : ""}. Go on from here`);
    button.disabled = !usable;
    button.addEventListener("click", () => {
      this.#element.hidePopover();
      take(name);
    });
    item.append(button);
    return item;
  }

  #key(event) {
    const buttons = [...this.#element.querySelectorAll("button:enabled")];
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step === undefined) return;
    const place = buttons.indexOf(document.activeElement) + step;
    buttons[(place + buttons.length) % buttons.length].focus();
    event.preventDefault();
  }

  #place(token) {
    const { width, height } = this.#element.getBoundingClientRect();
    const left = Math.max(GAP, Math.min(token.left, window.innerWidth - width - GAP));
    const below = token.bottom + GAP;
    const top = below + height <= window.innerHeight ? below : Math.max(GAP, token.top - height - GAP);
    this.#element.style.setProperty("--left", `${left}px`);
    this.#element.style.setProperty("--top", `${top}px`);
  }
}

/** A token's spelling with its spaces to be seen. */
function quoted(name) {
  return name.startsWith("bytes:") ? name : name.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");
}
