// One setting and what comes of it: the fields, the run, the figures, the code. The page has one, or two to compare.
import { Choice } from "./choice.js";
import { copy } from "./clipboard.js";
import { Fields } from "./fields.js";
import { curl, javascript, python } from "./snippets.js";
import { completion } from "./stream.js";
import { spelled } from "./values.js";

const SPELLINGS = { curl, python, javascript };

export class Pane {
  #page;
  #service;
  #alternatives;
  #choices = new Map();
  #run = null; // an AbortController
  #prompt = ""; // of the run that is shown
  #echoed = false;

  /** `page` gives `prompt`, `model`, `keysOn` and `comparing`, and is told by `changed`, `announce`, `failed` and `markPrompt`. */
  constructor(template, { name, schema, definitions, page, service, alternatives }) {
    this.#page = page;
    this.#service = service;
    this.#alternatives = alternatives;
    this.name = name;
    this.element = template.content.cloneNode(true).firstElementChild;
    this.element.setAttribute("aria-label", `Settings ${name} and their text`);
    this.#part(".name").textContent = name;
    this.fields = new Fields(schema, definitions, {
      prefix: name.toLowerCase(),
      first: this.#part(".first"),
      rest: this.#part(".rest"),
      changed: () => this.#changed(),
    });
    this.#part(".reset").addEventListener("click", () => this.fill({}));
    this.#part(".copy-text").addEventListener("click", () => this.#copied("The text", this.text));
    this.#part(".copy-code").addEventListener("click", () => this.#copied("The code", this.#part("code").textContent));
    this.#part(".code").addEventListener("toggle", () => this.refresh());
    for (const language of this.element.querySelectorAll(".languages input")) {
      language.name = `${name.toLowerCase()}-language`;
      language.addEventListener("change", () => this.refresh());
    }
    this.#count();
  }

  get running() {
    return this.#run !== null;
  }

  get text() {
    return [...this.#choices.values()].map((choice) => choice.tokens.text).join("\n\n");
  }

  fill(typed) {
    this.fields.fill(typed);
    this.#changed();
  }

  /** Asks for a completion of the page's prompt. Returns when it has ended, well or not, or was not begun. */
  async run() {
    const values = this.#checked();
    if (values === null) return;
    this.stop();
    this.#alternatives.close();
    this.#choices.clear();
    this.#part(".choices").replaceChildren();
    this.#prompt = this.#page.prompt;
    this.#echoed = values.echo === true;
    await this.#follow(bodyOf(this.#prompt, values), { base: 0, into: (index) => this.#choice(index) });
  }

  /** What the fields say; where one is wrong that is told, and it is null. */
  #checked() {
    const values = this.fields.check();
    if (values === null) {
      this.fields.focusWrong();
      this.#page.announce("A field is wrong, and nothing was sent.");
    }
    return values;
  }

  /** Takes the pane off the page. */
  remove() {
    this.stop();
    this.#alternatives.close();
    this.element.remove();
  }

  /** Ends what runs: the connection is closed, and with it the request in the engine. */
  stop() {
    this.#run?.abort();
    this.#run = null;
  }

  /** Shows the code of what the fields say now. */
  refresh() {
    if (!this.#part(".code").open) return;
    const values = this.fields.values;
    const language = this.element.querySelector(".languages input:checked").value;
    const about = { keysOn: this.#page.keysOn, model: this.#page.model };
    const code = values && SPELLINGS[language](bodyOf(this.#page.prompt, values), about);
    this.#part("code").textContent = code ?? "A field is wrong.";
    this.#part(".copy-code").disabled = values === null;
  }

  async #follow(body, { base, into }) {
    const run = (this.#run = new AbortController());
    const scored = body.logprobs !== undefined;
    const figures = new Figures();
    this.#tellError(null);
    this.element.classList.add("running");
    this.#show(figures);
    this.#announce("Running.");
    this.#page.changed();
    let end = "";
    try {
      for await (const chunk of completion(this.#service, spelled(body), run.signal)) {
        run.signal.throwIfAborted(); // a chunk may have been on its way
        for (const piece of chunk.choices) into(piece.index).append(piece, { scored, base });
        figures.take(chunk);
        this.#show(figures);
      }
      end = `Done: ${figures.words}.`;
    } catch (error) {
      if (error.name === "AbortError") {
        end = `Stopped: ${figures.words}.`;
        figures.stopped = true;
      } else if (this.#run === run) {
        this.#failed(error);
      }
    } finally {
      if (this.#run === run || this.#run === null) this.#ended(figures, end);
    }
  }

  #ended(figures, end) {
    this.#run = null;
    this.element.classList.remove("running");
    for (const choice of this.#choices.values()) choice.tokens.draw();
    figures.ended = true;
    this.#show(figures);
    if (end) this.#announce(end);
    this.#page.changed();
  }

  /** How a run goes, as the figures show it. Which of two settings it is needs no word where there is one. */
  #announce(words) {
    this.#page.announce(this.#page.comparing ? `${this.name}: ${words}` : words, { seen: false });
  }

  #choice(index) {
    let choice = this.#choices.get(index);
    if (!choice) {
      choice = new Choice(index, this.#echoed ? "" : this.#prompt, (...token) => this.#open(...token));
      this.#choices.set(index, choice);
      const shown = [...this.#choices.values()].sort((one, other) => one.index - other.index);
      const next = shown[shown.indexOf(choice) + 1];
      this.#part(".choices").insertBefore(choice.element, next?.element ?? null);
    }
    return choice;
  }

  #open(choice, index) {
    const token = choice.tokens.span(index);
    this.#alternatives.open(token, choice.tokens.entries[index], (name) => this.#continue(choice, index, name));
  }

  /** Takes an alternative in a token's place, and lets the text go on from there with what the fields say now. */
  async #continue(choice, index, name) {
    const checked = this.#checked();
    if (checked === null) return;
    const { best_of: _, echo: __, n: ___, ...values } = checked;
    this.stop();
    const base = choice.tokens.take(index, name);
    choice.end("");
    const text = choice.tokens.text;
    const prompt = this.#echoed ? text : this.#prompt + text;
    await this.#follow(bodyOf(prompt, values), { base, into: () => choice });
  }

  #show(figures) {
    this.#part(".figures").textContent = figures.words;
  }

  #failed(error) {
    const told =
      error.param != null && // an error of the page itself has none
      (this.fields.mark(fieldOf(error.param), error.message) || this.#page.markPrompt(error.param, error.message));
    if (told) this.fields.focusWrong();
    this.#tellError(error);
    this.#page.failed(error);
  }

  #tellError(error) {
    const box = this.#part(".error");
    box.hidden = error === null;
    if (error === null) {
      box.replaceChildren();
      return;
    }
    const message = document.createElement("p");
    message.textContent = error.message;
    const about = document.createElement("p");
    about.className = "about";
    const words = [error.status > 200 && `HTTP ${error.status}`, error.code];
    if (error.retryAfter) words.push(`try again in ${error.retryAfter} s`);
    if (error.requestId) words.push(`request ${error.requestId}`);
    about.textContent = words.filter(Boolean).join(" · ");
    box.replaceChildren(message, about);
  }

  async #copied(what, text) {
    this.#page.announce((await copy(text)) ? `${what} is copied.` : `${what} could not be copied.`);
  }

  #changed() {
    this.#count();
    this.refresh();
    this.#page.changed();
  }

  #count() {
    const count = this.fields.numFolded;
    this.#part(".count").textContent = count ? `${count} set` : "";
  }

  #part(selector) {
    return this.element.querySelector(selector);
  }
}

/** How a run goes: tokens, time to the first one, tokens a second, and what the server says of its own time. */
class Figures {
  #began = performance.now();
  #first = null;
  #last = null;
  #numTokens = 0;
  #usage = null;
  stopped = false;
  ended = false;

  take({ choices, usage }) {
    this.#usage = usage ?? this.#usage;
    const fresh = choices.reduce((sum, { text, logprobs }) => sum + (logprobs?.tokens.length ?? (text ? 1 : 0)), 0);
    if (!fresh) return;
    this.#numTokens += fresh;
    this.#last = performance.now();
    this.#first ??= { at: this.#last, numTokens: this.#numTokens };
  }

  get words() {
    const numTokens = this.#usage?.completion_tokens ?? this.#numTokens;
    if (!numTokens && !this.#usage) return this.stopped ? "Stopped before the first token" : this.ended ? "Failed" : "Waiting";
    const words = [`${numTokens} ${numTokens === 1 ? "token" : "tokens"}`];
    if (this.stopped) words.unshift("Stopped");
    if (this.#first !== null) words.push(`first after ${Math.round(this.#first.at - this.#began)} ms`);
    const seconds = (this.#last - this.#first?.at) / 1000;
    if (seconds > 0) words.push(`${((this.#numTokens - this.#first.numTokens) / seconds).toFixed(0)} tokens/s`);
    const { queue_ms: queue, prefill_ms: prefill } = this.#usage?.timings ?? {};
    if (queue !== undefined) words.push(`queue ${queue.toFixed(0)} ms`, `prefill ${prefill.toFixed(0)} ms`);
    return words.join(" · ");
  }
}

function bodyOf(prompt, values) {
  return prompt === "" ? values : { prompt, ...values };
}

/** The name of the field that a parameter of an error belongs to, which may be a part of it. */
function fieldOf(param) {
  return String(param).split(/[.[]/)[0];
}
