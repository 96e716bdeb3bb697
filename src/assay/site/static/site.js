"use strict";
// Buttons that copy, where the browser allows it.
for (const block of document.querySelectorAll("main pre")) {
  if (!navigator.clipboard) break;
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = "Copy";
  button.setAttribute("aria-label", "Copy: " + block.textContent.trim().slice(0, 60));
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(block.querySelector("code").textContent.trim());
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  block.append(button);
}

// An exported list has no server: it is filtered here, by words, and the address behind # keeps the choice.
const form = document.getElementById("filter");
if (form && !form.hasAttribute("hx-get")) {
  const names = ["q", "family", "saves", "verdict", "machine", "model"];
  const papers = [...document.querySelectorAll(".paper[data-family]")].map((node) => ({
    node,
    text: node.textContent.toLowerCase(),
    claims: [...node.querySelectorAll(".claims > li")],
  }));
  const like = (form.dataset.like || "").split(" ");
  const show = () => {
    const wanted = Object.fromEntries(names.map((name) => [name, form.elements[name].value.trim()]));
    const words = wanted.q.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const { node, text, claims } of papers) {
      const on = (claim) => (!wanted.verdict || claim.dataset.verdict === wanted.verdict) &&
        (!wanted.machine || (wanted.machine === "like-mine" ? like.includes(claim.dataset.machine) : claim.dataset.machine === wanted.machine));
      const models = node.dataset.model.split("|");
      const fits = words.every((word) => text.includes(word)) &&
        (!wanted.family || node.dataset.family === wanted.family) &&
        (!wanted.saves || node.dataset.saves.split(" ").includes(wanted.saves)) &&
        (!wanted.model || models.includes(wanted.model) || models.includes("any network")) &&
        ((!wanted.verdict && !wanted.machine) || claims.some(on));
      node.hidden = !fits;
      for (const claim of claims) claim.hidden = Boolean(wanted.verdict || wanted.machine) && !on(claim);
      count += fits;
    }
    document.querySelector(".found").textContent = count + (count === 1 ? " paper" : " papers");
    const kept = new URLSearchParams(Object.entries(wanted).filter(([, value]) => value)).toString();
    history.replaceState(null, "", kept ? "#" + kept : location.pathname + location.search);
  };
  const read = () => {
    const asked = new URLSearchParams(location.hash.slice(1));
    for (const name of names) form.elements[name].value = asked.get(name) || "";
    show();
  };
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => { event.preventDefault(); show(); });
  window.addEventListener("hashchange", read);
  read();
}

// A running command: what it says comes as it says it; at the end the page is made anew.
// A hidden tab lets go of its connection: a browser has six for a server, and a seventh tab would wait for ever.
const log = document.querySelector("[data-events]");
if (log && window.EventSource) {
  let source = null;
  const watch = () => {
    if (document.hidden) {
      if (source) source.close();
      source = null;
      return;
    }
    if (source) return;
    source = new EventSource(log.dataset.events);
    let first = true;
    source.addEventListener("log", (event) => {
      log.textContent = (first ? "" : log.textContent) + JSON.parse(event.data);
      first = false;
      log.parentElement.scrollTop = log.parentElement.scrollHeight;
    });
    source.addEventListener("end", () => { source.close(); location.reload(); });
    source.addEventListener("error", () => {
      if (source && source.readyState === EventSource.CLOSED) setTimeout(() => location.reload(), 5000);
    });
  };
  document.addEventListener("visibilitychange", watch);
  watch();
}

// Coming from a paper's page, that paper is chosen.
const chosen = new URLSearchParams(location.search).get("paper");
const choice = document.getElementById("paper");
if (chosen && choice) choice.value = chosen;
