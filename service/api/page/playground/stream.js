// The body of a completion's answer, as it comes: server-sent events, or one JSON document.
import { NOT_OURS, ServiceError } from "./service.js";

/** The data of each event of a body of server-sent events. A character, a line or an event may be cut anywhere. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return; // an event without its blank line is none
      // A line ends with \r\n, \n or \r; one \r at the end may be half of the first.
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        } // comments, which keep the connection alive, and other fields say nothing to us
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever leaves early lets the server know
  }
}

/**
 * The chunks of a completion; without `stream` in the body the whole answer is the only one.
 *
 * Throws ServiceError, also for an error in the stream and for one that breaks off.
 */
export async function* completion(service, body, signal) {
  const response = await service.ask("v1/completions", { body, signal });
  const requestId = response.headers.get("X-Request-Id");
  try {
    if (!response.headers.get("Content-Type")?.startsWith("text/event-stream")) {
      yield checked(await response.json(), requestId);
      return;
    }
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      yield checked(JSON.parse(data), requestId);
    }
  } catch (error) {
    if (error instanceof ServiceError || error.name === "AbortError") throw error;
    if (error instanceof SyntaxError) throw new ServiceError(NOT_OURS, { requestId }); // JSON.parse's
    throw new ServiceError(`The connection broke off: ${error.message}`, { requestId });
  }
  throw new ServiceError("The connection broke off before the end.", { requestId });
}

function checked(chunk, requestId) {
  if (chunk?.error) throw new ServiceError(chunk.error.message, { ...chunk.error, status: 200, requestId });
  if (!Array.isArray(chunk?.choices)) throw new ServiceError(NOT_OURS, { requestId });
  return chunk;
}
