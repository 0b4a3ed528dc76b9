/** Tabs whose choice is the address's fragment; arrow keys move between them. */
import { all, byId } from "./dom";

export function initTabs(): void {
  const tabs = all<HTMLButtonElement>("[role=tab]");
  const show = (name: string, focus = false) => {
    const chosen = tabs.find((tab) => tab.dataset.tab === name) ?? tabs[0];
    for (const tab of tabs) {
      const on = tab === chosen;
      tab.setAttribute("aria-selected", String(on));
      tab.tabIndex = on ? 0 : -1;
      byId(`panel-${tab.dataset.tab}`).hidden = !on;
    }
    if (focus) chosen.focus();
    const strip = chosen.parentElement!;
    strip.scrollLeft = Math.min(strip.scrollLeft, chosen.offsetLeft - strip.offsetLeft - 12);
    strip.scrollLeft = Math.max(strip.scrollLeft, chosen.offsetLeft - strip.offsetLeft + chosen.offsetWidth + 12 - strip.clientWidth);
    // Panels that the server renders are fetched when they are first looked at, and again on each look.
    byId(`panel-${chosen.dataset.tab}`).dispatchEvent(new CustomEvent("shown"));
  };
  for (const [i, tab] of tabs.entries()) {
    tab.addEventListener("click", () => history.replaceState(null, "", `#${tab.dataset.tab}`));
    tab.addEventListener("click", () => show(tab.dataset.tab!));
    tab.addEventListener("keydown", (event) => {
      const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: tabs.length - 1 }[event.key];
      if (to !== undefined) tabs[(to + tabs.length) % tabs.length].click();
      if (to !== undefined) tabs[(to + tabs.length) % tabs.length].focus();
    });
  }
  addEventListener("hashchange", () => show(location.hash.slice(1)));
  show(location.hash.slice(1));
  // htmx listens only once the page has loaded.
  addEventListener("load", () => show(location.hash.slice(1)));
}
