/** Search boxes that leave only what has all their words: `<input data-filter="id">` over the `[data-entry]` in the element with that id. */
import { all, byId } from "./dom";

const words = (text: string): string[] => text.toLowerCase().split(/\s+/).filter(Boolean);

/** Whether `text` has all of the words of `query`, in any order and case. */
export function matches(text: string, query: string): boolean {
  const inside = text.toLowerCase();
  return words(query).every((word) => inside.includes(word));
}

function show(entry: HTMLElement, visible: boolean): void {
  entry.hidden = !visible;
  if (entry instanceof HTMLOptionElement) entry.disabled = !visible; // Safari shows hidden options
}

/** Shows what matches, hides groups (`[data-entries]`) with nothing left, and says how many entries are. */
function apply(box: HTMLInputElement, target: HTMLElement): void {
  let left = 0;
  for (const entry of all("[data-entry]", target)) {
    const visible = matches(`${entry.dataset.entry} ${entry.textContent}`, box.value);
    show(entry, visible);
    left += Number(visible);
  }
  for (const group of all("[data-entries]", target)) group.hidden = all("[data-entry]", group).every((entry) => entry.hidden);
  const said = box.dataset.count ? byId(box.dataset.count) : null;
  if (said) said.textContent = words(box.value).length ? (left ? `${left} left` : "Nothing has all of these words.") : "";
}

/** Takes the first option that is left, as a choice by hand. */
function take(list: HTMLSelectElement): void {
  const first = all<HTMLOptionElement>("[data-entry]", list).find((option) => !option.hidden);
  if (!first) return;
  list.value = first.value;
  list.dispatchEvent(new Event("change", { bubbles: true }));
}

export function initFilters(): void {
  for (const box of all<HTMLInputElement>("input[data-filter]")) {
    const target = byId(box.dataset.filter!);
    box.addEventListener("input", (event) => {
      event.stopPropagation(); // it is no field of the form that it may stand in
      apply(box, target);
    });
    box.addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      event.preventDefault();
      if (target instanceof HTMLSelectElement) take(target);
    });
    if (box.value) apply(box, target); // the browser keeps it over a reload
  }
}
