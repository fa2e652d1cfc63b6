// A request as a program would send it. Used by pane.js; the key is a variable, never the key itself.
import { ROOT } from "./service.js";
import { spelled } from "./values.js";

/** What openai-python's `completions.create` has an argument for; the others go into `extra_body`. */
const OPENAI = new Set(
  (
    "model prompt best_of echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop stream " +
    "stream_options temperature top_p user"
  ).split(" "),
);

export function curl(body, { keysOn }) {
  const lines = [`curl -N ${shell(`${ROOT}v1/completions`)}`, "-H 'Content-Type: application/json'"];
  if (keysOn) lines.push('-H "Authorization: Bearer $API_KEY"');
  lines.push(`-d ${shell(spelled(body))}`);
  return lines.join(" \\\n  ");
}

export function python(body, { keysOn, model }) {
  const request = { model, prompt: "", ...body };
  const known = Object.entries(request).filter(([name]) => OPENAI.has(name));
  const others = Object.fromEntries(Object.entries(request).filter(([name]) => !OPENAI.has(name)));
  const call = known.map(([name, value]) => `    ${name}=${pythonic(value)},\n`);
  if (Object.keys(others).length) call.push(`    extra_body=${pythonic(others)},\n`);
  const client = `client = OpenAI(base_url=${pythonic(`${ROOT}v1`)}, api_key=${keysOn ? 'os.environ["API_KEY"]' : '"none"'})\n`;
  const create = `client.completions.create(\n${call.join("")})\n`;
  const shown = request.stream
    ? `for chunk in ${create.trimEnd()}:\n    for choice in chunk.choices:\n        print(choice.text, end="", flush=True)\n`
    : `answer = ${create}for choice in answer.choices:\n    print(choice.text)\n`;
  return `${keysOn ? "import os\n\n" : ""}from openai import OpenAI\n\n${client}${shown}`;
}

export function javascript(body, { keysOn }) {
  const headers = ['"Content-Type": "application/json"'];
  if (keysOn) headers.push("Authorization: `Bearer ${API_KEY}`");
  const members = Object.entries(body).map(([name, value]) => `    ${name}: ${scripted(value)},\n`);
  const ask = `const response = await fetch(${JSON.stringify(`${ROOT}v1/completions`)}, {
  method: "POST",
  headers: { ${headers.join(", ")} },
  body: JSON.stringify({\n${members.join("")}  }),
});
if (!response.ok) throw new Error(await response.text());
`;
  const streamed = `let rest = "";
let text = "";
for await (const piece of response.body.pipeThrough(new TextDecoderStream())) {
  const lines = (rest + piece).split("\\n");
  rest = lines.pop();
  for (const line of lines) {
    if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
    const chunk = JSON.parse(line.slice(6));
    if (chunk.error) throw new Error(chunk.error.message);
    for (const choice of chunk.choices) text += choice.text;
  }
}
console.log(text);
`;
  const whole = "for (const choice of (await response.json()).choices) console.log(choice.text);\n";
  return `${keysOn ? 'const API_KEY = "your key";\n' : ""}${ask}${body.stream ? streamed : whole}`;
}

/** One word of a POSIX shell, in which nothing is expanded. */
function shell(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

/** A value as Python writes it. A string of JSON is one of Python too. */
function pythonic(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(pythonic).join(", ")}]`;
  if (typeof value === "object") {
    const members = Object.entries(value).map(([name, member]) => `${JSON.stringify(name)}: ${pythonic(member)}`);
    return `{${members.join(", ")}}`;
  }
  return spelled(value);
}

/** A value as JavaScript writes it; a number of more digits than a double has is written out where it is sent. */
function scripted(value) {
  return typeof value === "bigint" ? `JSON.rawJSON("${value}")` : spelled(value);
}
