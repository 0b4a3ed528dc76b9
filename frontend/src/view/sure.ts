/** Buttons whose first press asks and whose second does it. */

/** Whether this press of `button` is the second one; at the first the button asks `question`. */
export function isSure(button: HTMLButtonElement, question: string): boolean {
  if (button.dataset.sure !== undefined) return true;
  button.dataset.sure = "";
  button.textContent = question;
  return false;
}
