// The fields of a request as a form, made from the schema of /openapi.json. Each pane has its own.
import { kindOf, limits, parse } from "./values.js";

/** Those that are always seen; the rest stand behind a disclosure, in the schema's order. */
const FIRST = ["max_tokens", "temperature", "top_p", "top_k", "seed", "stop"];
/** What the page has elsewhere. */
const NOT_HERE = ["prompt"];
/** What the page asks for where a request by hand would not: enough to see, and what the shades are made of. */
const PRESETS = {
  max_tokens: "64",
  temperature: "0.8",
  logprobs: "5",
  stream: "true",
  stream_options: '{"include_usage": true}',
};
const MAX_SLIDER = 4; // a slider over a wider range hits nothing exactly

export class Fields {
  #fields = new Map(); // name -> what it takes, its controls and where its error is told
  #changed;

  /** Fills the places `first` and `rest` of a pane; `changed` is called after each edit. */
  constructor(schema, definitions, { prefix, first, rest, changed }) {
    this.#changed = changed;
    const names = Object.keys(schema.properties).filter((name) => !NOT_HERE.includes(name));
    for (const name of [...FIRST, ...names.filter((name) => !FIRST.includes(name))]) {
      const about = schema.properties[name];
      if (about === undefined) continue; // of another version of the service
      const field = fieldOf(`${prefix}-${name}`, name, about, kindOf(about, definitions));
      this.#fields.set(name, field);
      (FIRST.includes(name) ? first : rest).append(field.element);
      field.element.addEventListener("input", (event) => this.#edited(name, event.target));
    }
    this.fill({});
  }

  /** What is typed in each field that is not as the page begins. */
  get typed() {
    const all = [...this.#fields].map(([name, field]) => [name, read(field)]);
    return Object.fromEntries(all.filter(([name, raw]) => raw !== preset(this.#fields.get(name), name)));
  }

  /** Takes `typed` of such a form; what it does not name is as the page begins. */
  fill(typed) {
    for (const [name, field] of this.#fields) {
      write(field, typed[name] ?? preset(field, name));
      this.#check(name);
    }
  }

  /** The fields that are not at their default, by name; null when one is wrong. Marks stay as they are. */
  get values() {
    const values = {};
    for (const [name, field] of this.#fields) {
      const value = valueOf(field);
      if (value instanceof Error) return null;
      if (value !== undefined) values[name] = value;
    }
    return values;
  }

  /** The same, each field marked anew: what the server said of one is gone. */
  check() {
    for (const name of this.#fields.keys()) this.#check(name);
    return this.values;
  }

  /** Marks a field as wrong, by the server's word; false if there is none of that name. */
  mark(name, message) {
    const field = this.#fields.get(name);
    if (field) tell(field, message);
    return field !== undefined;
  }

  /** Brings the first field that is marked into view. */
  focusWrong() {
    const field = [...this.#fields.values()].find(({ error }) => !error.hidden);
    if (!field) return;
    const folded = field.element.closest("details");
    if (folded) folded.open = true;
    field.control.focus();
  }

  /** How many of the fields behind the disclosure are set. */
  get numFolded() {
    return Object.entries(this.typed).filter(([name, raw]) => !FIRST.includes(name) && raw !== "").length;
  }

  suggest(name, options) {
    const field = this.#fields.get(name);
    if (!field) return;
    const list = field.element.querySelector("datalist") ?? document.createElement("datalist");
    list.id = `${field.control.id}-options`;
    list.replaceChildren(...options.map((option) => new Option(option, option)));
    field.control.setAttribute("list", list.id);
    field.element.append(list);
  }

  #edited(name, target) {
    const field = this.#fields.get(name);
    if (target === field.slider) field.control.value = field.slider.value;
    else slide(field);
    this.#check(name);
    this.#changed();
  }

  /** Tells beside a field what is wrong with it, or nothing. */
  #check(name) {
    const field = this.#fields.get(name);
    const value = valueOf(field);
    tell(field, value instanceof Error ? value.message : "");
  }
}

/** The value of a field, undefined at the default, or the Error that says what is wrong. */
function valueOf(field) {
  try {
    if (field.control.validity.badInput) throw new Error("must be a number");
    const value = parse(read(field), field.about);
    return field.about.kind !== "json" && value === field.byDefault ? undefined : value;
  } catch (error) {
    return error;
  }
}

function fieldOf(id, name, schema, about) {
  const element = document.createElement("div");
  element.className = "field";
  element.dataset.kind = about.kind;
  element.dataset.field = name;
  const label = document.createElement("label");
  label.htmlFor = id;
  label.textContent = name;
  const control = controlOf(about, schema);
  control.id = id;
  control.setAttribute("aria-describedby", `${id}-help ${id}-error`);
  const help = document.createElement("p");
  help.className = "help";
  help.id = `${id}-help`;
  help.textContent = `${schema.description ?? ""}${note(about)}`;
  const error = document.createElement("p");
  error.className = "wrong";
  error.id = `${id}-error`;
  error.hidden = true;
  element.append(label, control);
  let slider = null;
  if (about.maximum - (about.minimum ?? about.exclusiveMinimum) <= MAX_SLIDER && about.kind === "number") {
    slider = document.createElement("input");
    Object.assign(slider, { type: "range", min: about.minimum, max: about.maximum, step: 0.01 });
    slider.setAttribute("aria-label", `${name}, slider`);
    element.append(slider);
  }
  element.append(error, help);
  return { element, control, slider, error, about, byDefault: schema.default ?? undefined };
}

function note(about) {
  switch (about.kind) {
    case "integer":
    case "number":
      return limits(about) && ` ${sentence(limits(about))}`;
    case "strings":
      return " One a line; \\n is a line break.";
    case "ids":
      return " Numbers with commas or spaces between.";
    case "json":
      return " JSON.";
    default:
      return "";
  }
}

function sentence(words) {
  return `${words[0].toUpperCase()}${words.slice(1)}.`;
}

function controlOf(about, schema) {
  if (about.kind === "choice") {
    const select = document.createElement("select");
    select.append(...about.options.map((option) => new Option(option, option)));
    return select;
  }
  if (about.kind === "strings" || about.kind === "json") {
    const area = document.createElement("textarea");
    Object.assign(area, { rows: 1, spellcheck: false });
    return area;
  }
  const input = document.createElement("input");
  Object.assign(input, { autocomplete: "off", spellcheck: false });
  if (about.kind === "boolean") {
    input.type = "checkbox";
  } else if (about.kind === "integer" || about.kind === "number") {
    Object.assign(input, { type: "number", step: about.kind === "integer" ? 1 : "any" });
    const low = about.minimum ?? about.exclusiveMinimum;
    if (Math.abs(low) < 2 ** 31) input.min = low;
    if (about.maximum < 2 ** 31) input.max = about.maximum;
    if (typeof schema.default === "number") input.placeholder = schema.default;
    if (about.kind === "number" && about.maximum - low <= MAX_SLIDER) input.step = 0.05;
  } else {
    input.type = "text";
  }
  return input;
}

/** What stands in a field at the start. A box and a choice have no state that means "left out": theirs is the default. */
function preset(field, name) {
  const shown = { boolean: String(field.byDefault ?? false), choice: field.byDefault };
  return PRESETS[name] ?? shown[field.about.kind] ?? "";
}

function read({ control, about }) {
  return about.kind === "boolean" ? String(control.checked) : control.value;
}

function write(field, raw) {
  if (field.about.kind === "boolean") field.control.checked = raw === "true";
  else field.control.value = raw;
  slide(field);
}

function slide({ control, slider, byDefault }) {
  if (slider) slider.value = control.value === "" ? byDefault : control.value;
}

function tell({ control, error }, message) {
  error.textContent = message;
  error.hidden = message === "";
  if (message === "") control.removeAttribute("aria-invalid");
  else control.setAttribute("aria-invalid", "true");
}
