/** Single keys that act on the page, the dialog that lists them (`?`), and the switch that turns them off. */
import { byId, el, readStored, setText, store as keep } from "./dom";

export interface Shortcut {
  key: string;
  does: string;
  /** Returns what a screen reader is told, where moving the focus does not say it. Left out where a control hears the key itself. */
  act?: () => string | void;
  /** The control that does the same. */
  control?: string;
}

const OFF = "keys-off";
const TYPED_INTO = "textarea, select, [contenteditable], input:not([type=checkbox], [type=radio], [type=range], [type=button])";

export function initKeys(shortcuts: Shortcut[]): void {
  const dialog = dialogOf(shortcuts);
  const said = el("p", { className: "sr-only", role: "status" });
  const open = el("button", { type: "button", className: "icon", id: "keys-open", title: "Keyboard shortcuts (?)", "aria-label": "Keyboard shortcuts", "aria-keyshortcuts": "?" }, "⌨");
  open.addEventListener("click", () => dialog.showModal());
  byId("theme").before(open);
  document.body.append(dialog, said);
  for (const { key, control } of shortcuts) if (control) document.querySelector(control)?.setAttribute("aria-keyshortcuts", key);
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || readStored(OFF) === "1") return;
    if ((event.target as Element).closest(TYPED_INTO) || document.querySelector("dialog[open]")) return;
    const known = event.key === "?" ? () => dialog.showModal() : shortcuts.find(({ key }) => key === event.key)?.act;
    if (!known) return;
    event.preventDefault();
    setText(said, known() ?? "");
  });
}

function dialogOf(shortcuts: Shortcut[]): HTMLDialogElement {
  const on = el("input", { type: "checkbox", checked: readStored(OFF) !== "1" });
  on.addEventListener("change", () => keep(OFF, on.checked ? "0" : "1"));
  const all = [...shortcuts.map(({ key, does }): [string, string] => [key, does]), ["?", "Show these keys"]];
  const dialog = el(
    "dialog",
    { className: "keys", "aria-labelledby": "keys-title" },
    el(
      "article",
      {},
      el("h2", { id: "keys-title" }, "Keyboard shortcuts"),
      el("dl", {}, ...all.map(([key, does]) => el("div", {}, el("dt", {}, el("kbd", {}, key)), el("dd", {}, does)))),
      el("label", {}, on, " Single keys act on the pages"),
      el("form", { method: "dialog", className: "end" }, el("button", { className: "plain" }, "Close")),
    ),
  );
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  return dialog;
}
