// Light, dark, or what the system says: kept for the next visit. Loaded before the page is drawn, so that it never flashes.
"use strict";

const theme = {
  name: "megatron-gpt2 theme",
  get chosen() {
    try {
      return localStorage.getItem(this.name) ?? "system";
    } catch {
      return "system"; // a browser that keeps nothing
    }
  },
  choose(value) {
    document.documentElement.dataset.theme = value;
    try {
      localStorage.setItem(this.name, value);
    } catch {
      // then it holds for this visit
    }
  },
};
document.documentElement.dataset.theme = theme.chosen;
document.addEventListener("DOMContentLoaded", () => {
  const choice = document.getElementById("theme");
  choice.value = theme.chosen;
  choice.addEventListener("change", () => theme.choose(choice.value));
});
