/** Buttons whose first press asks and whose second does it. */

/** After this the question is taken back. */
const ASKED_MS = 8_000;

/**
 * Whether this press of `button` is the second one; at the first the button asks `question`, until it is left, Escape is pressed, or time is up. A double
 * click is one press.
 */
export function isSure(button: HTMLButtonElement, question: string, press: MouseEvent): boolean {
  const asked = button.dataset.sure !== undefined;
  if (asked && press.detail < 2) button.dispatchEvent(new Event(TAKE_BACK));
  else if (!asked) ask(button, question);
  return asked && press.detail < 2;
}

const TAKE_BACK = "takeback";

function ask(button: HTMLButtonElement, question: string): void {
  const before = button.textContent;
  const listening = new AbortController();
  const { signal } = listening;
  button.dataset.sure = "";
  button.textContent = question;
  const takeBack = () => {
    listening.abort();
    clearTimeout(timer);
    delete button.dataset.sure;
    button.textContent = before;
  };
  const timer = setTimeout(takeBack, ASKED_MS);
  for (const kind of [TAKE_BACK, "blur"]) button.addEventListener(kind, takeBack, { signal });
  button.addEventListener("keydown", ({ key }) => key === "Escape" && takeBack(), { signal });
}
