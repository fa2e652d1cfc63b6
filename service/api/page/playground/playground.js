// The page: one prompt, one setting or two, and what they are run on. Loaded by playground.html.
import { Address, MAX_PROMPT } from "./address.js";
import { Alternatives } from "./alternatives.js";
import { copy } from "./clipboard.js";
import { KeyEntry } from "./key.js";
import { Load } from "./load.js";
import { Pane } from "./pane.js";
import { NOT_OURS, Service, ServiceError } from "./service.js";

const part = (id) => document.getElementById(id);

class Playground {
  #service = new Service();
  #address = new Address();
  #alternatives = new Alternatives(part("alternatives"));
  #key = new KeyEntry(part("key"), this.#service, () => this.#keyChanged());
  #load = new Load(this.#service, (state) => this.#tellState(state));
  #panes = [];
  #form = null; // the schema of a request, and what it refers to
  #asking = false; // for that
  #refused = false; // until there is another key
  #ready = null;
  #promptTyped = false;
  #trouble = ""; // why there is no form
  model = "";
  keysOn = false;

  constructor() {
    part("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.run();
    });
    part("stop").addEventListener("click", () => this.stop());
    part("compare").addEventListener("change", () => this.#compare(part("compare").checked));
    part("share").addEventListener("click", () => this.#share());
    part("key-button").addEventListener("click", () => this.#key.open());
    part("notice-key").addEventListener("click", () => this.#key.open());
    part("prompt").addEventListener("input", () => {
      this.#promptTyped = true;
      this.markPrompt("prompt", "");
      this.#panes.forEach((pane) => pane.refresh());
      this.changed();
    });
    document.addEventListener("keydown", (event) => this.#pressed(event));
    window.addEventListener("hashchange", () => this.#restore());
    this.#learn();
    this.#load.refresh();
  }

  get prompt() {
    return part("prompt").value;
  }

  get running() {
    return this.#panes.some((pane) => pane.running);
  }

  get comparing() {
    return this.#panes.length > 1;
  }

  async run() {
    if (!this.#form) {
      if (part("notice").hidden) this.announce("The service has not told its fields yet.");
      else this.#key.open();
      return;
    }
    if (this.#ready === false) {
      this.announce("The model is not ready yet.");
      return;
    }
    this.markPrompt("prompt", "");
    await Promise.all(this.#panes.map((pane) => pane.run()));
  }

  stop() {
    this.#panes.forEach((pane) => pane.stop());
  }

  // What panes tell

  changed() {
    this.#load.running = this.running;
    part("stop").setAttribute("aria-disabled", String(!this.running));
    document.body.classList.toggle("running", this.running);
    if (this.#panes.length) this.#address.write({ prompt: this.prompt, panes: this.#panes.map((pane) => pane.fields.typed) });
  }

  /** Beside the buttons, and to whoever does not see the page; `seen` is false for what is seen elsewhere on it. */
  announce(words, { seen = true } = {}) {
    part("status").classList.toggle("unseen", !seen);
    part("status").textContent = words;
  }

  failed(error) {
    if (error.status === 401) {
      this.keysOn = true;
      this.#key.open(this.#service.key === null ? "This service asks for a key." : "The key is not known here any more.");
    }
    this.#load.refresh();
  }

  markPrompt(param, message) {
    if (param !== "prompt") return false;
    part("prompt-wrong").textContent = message;
    part("prompt-wrong").hidden = message === "";
    if (message === "") part("prompt").removeAttribute("aria-invalid");
    else part("prompt").setAttribute("aria-invalid", "true");
    return true;
  }

  // What the service tells

  /** Reads the fields and their limits, and makes the panes. Asks for a key first where one is needed. */
  async #learn() {
    if (this.#form || this.#asking || this.#refused) return;
    this.#asking = true;
    try {
      const { components } = await this.#service.get("openapi.json");
      if (!components?.schemas?.CompletionRequest) throw new ServiceError(NOT_OURS);
      this.#needKey("securitySchemes" in components && this.#service.key === null);
      this.keysOn = "securitySchemes" in components;
      this.#form = { schema: components.schemas.CompletionRequest, definitions: components.schemas };
      this.#restore();
      this.#name();
      if (part("status").textContent === this.#trouble) this.announce("");
      part("compare").disabled = part("share").disabled = false;
      this.#tellRun();
    } catch (error) {
      if (error.status === 401) {
        this.keysOn = true;
        this.#refused = true;
        this.#needKey(true, this.#service.key === null ? "" : "The key is not known here.");
      } else if (error instanceof ServiceError) {
        this.#trouble = error.message;
        this.announce(error.message); // it is tried again when the service answers
      } else {
        throw error;
      }
    } finally {
      this.#asking = false;
      this.#load.keysOn = this.keysOn;
      part("key-button").hidden = !this.keysOn;
      this.#offerReference();
    }
  }

  /** A link has no key to send: where keys are on, /docs is linked if it is among the open routes. */
  async #offerReference() {
    const open = !this.keysOn || (await this.#service.ask("docs", { key: null }).then(Boolean, () => false));
    part("reference").hidden = !open;
  }

  #tellRun() {
    part("run").setAttribute("aria-disabled", String(!(this.#form && this.#ready)));
  }

  #needKey(needed, message = "") {
    part("notice").hidden = !needed;
    if (needed) this.#key.open(message);
  }

  #keyChanged() {
    this.#refused = false;
    part("notice").hidden = this.#service.key !== null;
    this.announce(this.#service.key === null ? "The key is forgotten." : "The key is kept until this tab is closed.");
    this.#load.refresh();
    this.#learn();
    this.#name();
  }

  /** Learns what the model is called. */
  async #name() {
    try {
      const { data } = await this.#service.get("v1/models");
      this.model = data[0].id;
      part("model").textContent = `${this.model} · ${data[0].max_model_len.toLocaleString("en")} tokens of context`;
      this.#panes.forEach((pane) => {
        pane.fields.suggest("model", data.map(({ id }) => id));
        pane.refresh();
      });
    } catch {
      part("model").textContent = ""; // while it loads, or without its key: it is asked again then
    }
  }

  #tellState({ ready, phase, progress, load }) {
    const began = ready && this.#ready !== true;
    this.#ready = ready;
    document.body.dataset.state = ready ? "ready" : "waiting";
    part("phase").textContent = ready ? "ready" : (PHASES[phase] ?? phase);
    const bar = part("progress");
    bar.hidden = ready || !(progress > 0 && progress < 1);
    bar.value = progress;
    this.#tellRun();
    part("load").hidden = load === null;
    if (load !== null) {
      part("running").textContent = load.running;
      part("waiting").textContent = load.waiting;
      part("kv").textContent = `${(100 * load.kv).toFixed(0)} %`;
      part("rate").textContent = load.rate.toFixed(0);
    }
    if (phase !== "unreachable") this.#learn();
    if (began) this.#name();
  }

  // What the person does

  #restore() {
    const { prompt, panes } = this.#address.read();
    if (!this.#form) return;
    const [example] = this.#form.schema.properties.prompt.examples ?? [""];
    if (this.#panes.length) part("prompt").value = prompt ?? this.prompt;
    else if (!this.#promptTyped) part("prompt").value = prompt ?? example; // or it was typed before the form came
    part("compare").checked = panes.length > 1;
    if (!this.#panes.length) this.#add("A");
    this.#compare(panes.length > 1);
    panes.forEach((typed, place) => this.#panes[place].fill(typed));
  }

  #add(name) {
    const about = { name, ...this.#form, page: this, service: this.#service, alternatives: this.#alternatives };
    const pane = new Pane(part("pane"), about);
    this.#panes.push(pane);
    part("panes").append(pane.element);
  }

  #compare(wanted) {
    if (!this.#form || wanted === this.#panes.length > 1) return;
    if (wanted) {
      this.#add("B");
      this.#panes[1].fill(this.#panes[0].fields.typed);
      this.#name();
    } else {
      this.#panes.pop().remove();
    }
    part("panes").classList.toggle("two", wanted);
    this.changed();
  }

  async #share() {
    this.#address.flush();
    const left = this.prompt.length > MAX_PROMPT ? ` without the prompt, which is over ${MAX_PROMPT} characters` : "";
    const copied = await copy(window.location.href);
    this.announce(copied ? `The link is copied${left}.` : "The link could not be copied.");
  }

  #pressed(event) {
    if (event.isComposing) return; // Escape and Enter are the input method's
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !part("key").open) {
      event.preventDefault();
      this.run();
    } else if (event.key === "Escape" && this.running && !this.#alternatives.isOpen && !part("key").open) {
      this.stop();
    }
  }
}

const PHASES = {
  start: "starting",
  download: "downloading the model",
  convert: "converting the model",
  load: "loading the model",
  warmup: "warming up",
  restart: "engine restarting",
  drain: "shutting down",
  failed: "failed",
  unreachable: "service not reachable",
};

new Playground();
