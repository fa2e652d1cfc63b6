// One choice of an answer: its tokens, and why it ended. Used by pane.js.
import { Tokens } from "./tokens.js";

const MAX_BEFORE = 400; // characters of a prompt that are shown again, to read on from

export class Choice {
  #reason;

  /** `before` is the text that it goes on from; `open` is called with this choice and the index of a token. */
  constructor(index, before, open) {
    this.index = index;
    this.element = document.createElement("article");
    this.element.className = "choice";
    const name = document.createElement("h3");
    name.textContent = `Choice ${index}`;
    const flow = document.createElement("p");
    flow.className = "flow";
    const prompt = document.createElement("span");
    prompt.className = "prompt";
    prompt.textContent = before.length > MAX_BEFORE ? `…${before.slice(-MAX_BEFORE)}` : before;
    const text = document.createElement("span");
    text.className = "tokens";
    flow.append(prompt, text);
    text.setAttribute("role", "group");
    text.setAttribute("aria-label", `Text of choice ${index}. Left and right go from token to token, Enter shows others`);
    this.#reason = document.createElement("p");
    this.#reason.className = "reason";
    this.element.append(name, flow, this.#reason);
    this.tokens = new Tokens(text, (token) => open(this, token));
  }

  append(piece, options) {
    this.tokens.append(piece, options);
    if (piece.finish_reason !== null) this.end(reasonOf(piece));
  }

  /** Says why the text ends where it does; empty while it does not. */
  end(reason) {
    this.#reason.textContent = reason;
  }
}

function reasonOf({ finish_reason: reason, stop_reason: stop }) {
  if (reason === "length") return "Ended at max_tokens";
  if (typeof stop === "string") return `Ended at the stop string ${JSON.stringify(stop)}`;
  if (typeof stop === "number") return `Ended at the token ${stop}`;
  return reason === "stop" ? "Ended by itself" : `Ended: ${reason}`;
}
