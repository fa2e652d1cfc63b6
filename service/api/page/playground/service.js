// The service that this page came from, over HTTP: its address, the key it is asked with, errors as it tells them.

/** The folder that the page stands in, with the slash at its end: behind a proxy's prefix that is not the host's root. */
export const ROOT = new URL(".", window.location.href).href;

const STORED_KEY = `megatron-gpt2 key ${ROOT}`;

/** An answer that is an error: `param` is the field that it is about, `body` all that was told. Status 0 is no answer. */
export class ServiceError extends Error {
  constructor(message, { status = 0, param = null, code = null, retryAfter = null, requestId = null, body = {} } = {}) {
    super(message);
    Object.assign(this, { status, param, code, retryAfter, requestId, body });
  }
}

export class Service {
  #key = stored();

  /** The key that is sent, or null. It is kept until the tab is closed, and forgotten when it is set to null. */
  get key() {
    return this.#key;
  }

  set key(key) {
    this.#key = key;
    try {
      if (key === null) sessionStorage.removeItem(STORED_KEY);
      else sessionStorage.setItem(STORED_KEY, key);
    } catch {
      // a browser that keeps nothing: the page itself still has it
    }
  }

  /** The answer of a route, which is relative to the page. Throws ServiceError; AbortError where `signal` ends it. */
  async ask(route, { body, signal } = {}) {
    const headers = {};
    if (this.#key !== null) headers.Authorization = `Bearer ${this.#key}`;
    if (body !== undefined) headers["Content-Type"] = "application/json";
    let response;
    try {
      response = await fetch(ROOT + route, { method: body === undefined ? "GET" : "POST", headers, body, signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServiceError("The service cannot be reached.");
    }
    if (!response.ok) throw await errorOf(response);
    return response;
  }
}

function stored() {
  try {
    return sessionStorage.getItem(STORED_KEY);
  } catch {
    return null;
  }
}

async function errorOf(response) {
  const about = {
    status: response.status,
    retryAfter: response.headers.get("Retry-After"),
    requestId: response.headers.get("X-Request-Id"),
  };
  let body = {};
  try {
    body = await response.json();
  } catch {
    // not ours: a proxy's
  }
  const message = body.error?.message ?? `The answer was ${response.status}.`;
  return new ServiceError(message, { ...body.error, ...about, body });
}
