/** What every page has: styles, theme, times, htmx without eval, copy buttons. */
import "../style/index.css";
import htmx from "htmx.org";
import { initFilters } from "../view/filter";
import { tellError, toast } from "../view/toast";
import { initTheme } from "../view/theme";
import { initTimes } from "../view/times";

htmx.config.allowEval = false;
htmx.config.allowScriptTags = false;
htmx.config.includeIndicatorStyles = false;
htmx.config.historyCacheSize = 0;
htmx.config.selfRequestsOnly = true;

function initCopy(): void {
  document.addEventListener("click", (event) => {
    const button = (event.target as Element).closest<HTMLElement>("[data-copy]");
    const source = button && document.getElementById(button.dataset.copy!);
    if (!source) return;
    const text = source instanceof HTMLInputElement ? source.value : (source.textContent ?? "");
    navigator.clipboard.writeText(text).then(() => toast("Copied"), tellError);
  });
}

/** A menu closes when the click or the focus goes elsewhere, and on Escape. */
function initMenus(): void {
  const closeAll = (except: Node | null) => {
    for (const menu of document.querySelectorAll<HTMLDetailsElement>("details.menu[open]")) if (!except || !menu.contains(except)) menu.open = false;
  };
  document.addEventListener("click", (event) => closeAll(event.target as Node));
  document.addEventListener("focusin", (event) => closeAll(event.target as Node));
  document.addEventListener("keydown", (event) => event.key === "Escape" && closeAll(null));
}

initTheme();
initTimes();
initCopy();
initMenus();
initFilters();
