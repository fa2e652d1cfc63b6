// The dialog in which a key is entered, tried and forgotten. The key itself is kept by service.js.

export class KeyEntry {
  #dialog;
  #input;
  #wrong;
  #service;
  #taken;
  #trying = false;

  /** `taken` is called when a key was entered that the service knows, and when it was forgotten. */
  constructor(dialog, service, taken) {
    this.#dialog = dialog;
    this.#service = service;
    this.#taken = taken;
    this.#input = dialog.querySelector("input");
    this.#wrong = dialog.querySelector(".wrong");
    dialog.querySelector("form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#try(this.#input.value.trim());
    });
    dialog.querySelector(".forget").addEventListener("click", () => this.#forget());
    dialog.querySelector(".close").addEventListener("click", () => dialog.close());
  }

  /** Asks for a key; `message` says why. */
  open(message = "") {
    if (this.#dialog.open) return; // what is being typed stays
    this.#input.value = this.#service.key ?? "";
    this.#dialog.querySelector(".forget").hidden = this.#service.key === null;
    this.#tell(message);
    this.#dialog.showModal();
    this.#input.focus();
  }

  async #try(key) {
    if (this.#trying) return;
    if (!/^[\x21-\x7e]+$/.test(key)) {
      this.#tell(key ? "A key has no spaces, and no letters beyond ASCII." : "Enter the key.");
      return;
    }
    this.#trying = true;
    try {
      await this.#service.ask("v1/models", { key });
    } catch (error) {
      if (error.status === 401 || error.status === 0) {
        this.#tell(error.status === 401 ? "This key is not known here." : error.message);
        return;
      } // 503 while it loads, 429 over the key's quota: the key is known
    } finally {
      this.#trying = false;
    }
    this.#service.key = key;
    this.#dialog.close();
    this.#taken();
  }

  #forget() {
    this.#service.key = null;
    this.#input.value = "";
    this.#dialog.close();
    this.#taken();
  }

  #tell(message) {
    this.#wrong.textContent = message;
    this.#wrong.hidden = message === "";
    if (message === "") this.#input.removeAttribute("aria-invalid");
    else this.#input.setAttribute("aria-invalid", "true");
  }
}
