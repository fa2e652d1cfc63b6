// Values of a request's fields: what their schema takes, and how what is typed becomes one. Used by fields.js.

/** What a field takes, out of its schema: a `kind` and its limits. */
export function kindOf(schema, definitions) {
  const forms = (schema.anyOf ?? [schema]).filter((form) => form.type !== "null").map((form) => resolved(form, definitions));
  const [first] = forms;
  const list = forms.find((form) => form.type === "array");
  if (forms.every((form) => form.type === "string" || form.items?.type === "string") && list) {
    return { kind: "strings", minItems: list.minItems ?? 0, maxItems: list.maxItems, ...lengths(list.items) };
  }
  if (forms.length > 1) return { kind: "json" };
  if (first.enum) return { kind: "choice", options: first.enum };
  switch (first.type) {
    case "boolean":
      return { kind: "boolean" };
    case "string":
      return { kind: "string", ...lengths(first) };
    case "integer":
    case "number":
      return { kind: first.type, ...range(first) };
    case "array":
      if (first.items.type === "integer") {
        return { kind: "ids", minItems: first.minItems ?? 0, maxItems: first.maxItems, ...range(first.items) };
      }
  }
  return { kind: "json" };
}

function resolved(form, definitions) {
  return form.$ref ? definitions[form.$ref.split("/").pop()] : form;
}

function range({ minimum, maximum, exclusiveMinimum, exclusiveMaximum }) {
  return { minimum, maximum, exclusiveMinimum, exclusiveMaximum };
}

function lengths({ minLength = 0, maxLength = Infinity }) {
  return { minLength, maxLength };
}

/** The limits of a number in words; empty where it has none that anyone would meet. */
export function limits({ minimum, maximum, exclusiveMinimum, exclusiveMaximum }) {
  const low = exclusiveMinimum !== undefined ? `above ${exclusiveMinimum}` : minimum;
  const high = maximum ?? (exclusiveMaximum < 2 ** 31 ? exclusiveMaximum : undefined);
  if (low === undefined || low < -(2 ** 31)) return high === undefined ? "" : `up to ${high}`;
  if (high === undefined) return exclusiveMinimum !== undefined ? low : `${low} or more`;
  return exclusiveMinimum !== undefined ? `${low}, up to ${high}` : `${low} to ${high}`;
}

/** The value of what was typed; undefined leaves the field out. Throws an Error that says what it must be. */
export function parse(raw, about) {
  if (raw === "") return undefined;
  switch (about.kind) {
    case "boolean":
      return raw === "true";
    case "integer":
      return ranged(integer(raw), about);
    case "number":
      return ranged(number(raw), about);
    case "string":
      return sized(raw, about);
    case "strings":
      return counted(raw.split("\n").filter((line) => line !== ""), about).map((line) => sized(unescaped(line), about));
    case "ids":
      return counted(raw.split(/[\s,]+/).filter((word) => word !== ""), about).map((word) => ranged(integer(word), about));
    case "json":
      return json(raw);
    default:
      return raw;
  }
}

function integer(raw) {
  if (!/^\s*[-+]?\d+\s*$/.test(raw)) throw new Error("must be a whole number");
  const value = Number(raw);
  return Number.isSafeInteger(value) ? value : BigInt(raw); // up to 64 bits, every one of which counts in a seed
}

function number(raw) {
  const value = Number(raw);
  if (!Number.isFinite(value)) throw new Error("must be a number");
  return value;
}

function ranged(value, about) {
  const { minimum, maximum, exclusiveMinimum, exclusiveMaximum } = about;
  if (value < minimum || value <= exclusiveMinimum || value > maximum || value >= exclusiveMaximum) {
    const words = limits(about);
    throw new Error(words ? `must be ${words}` : "must fit 64 bits");
  }
  return value;
}

function sized(text, { minLength, maxLength }) {
  const length = [...text].length;
  if (length < minLength || length > maxLength) throw new Error(`must have ${minLength} to ${maxLength} characters`);
  return text;
}

function counted(list, { minItems, maxItems = Infinity }) {
  if (list.length > maxItems) throw new Error(`must be at most ${maxItems}`);
  if (list.length < minItems) throw new Error(`must be at least ${minItems}`);
  return list;
}

/** A line, in which \n, \t and \r are what they stand for, and a backslash is written twice. */
function unescaped(line) {
  const meanings = { n: "\n", t: "\t", r: "\r", "\\": "\\" };
  return line.replace(/\\([ntr\\])/g, (_, letter) => meanings[letter]);
}

function json(raw) {
  try {
    return JSON.parse(raw);
  } catch (error) {
    throw new Error(`must be JSON: ${error.message}`);
  }
}

/** A value as JSON in one line; whole numbers keep all their digits. */
export function spelled(value) {
  if (typeof value === "bigint") return String(value);
  if (Array.isArray(value)) return `[${value.map(spelled).join(", ")}]`;
  if (value !== null && typeof value === "object") {
    const members = Object.entries(value).map(([name, member]) => `${JSON.stringify(name)}: ${spelled(member)}`);
    return `{${members.join(", ")}}`;
  }
  return JSON.stringify(value);
}
