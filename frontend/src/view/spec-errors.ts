/** Puts what the server refuses at the field it lies in, in a list under the YAML, and counts it over the form. */
import { getPath, isObject, pathOf, type PlainObject } from "../data/paths";
import type { Problem } from "../data/types";
import { all, byId, el } from "./dom";

export type FieldProblem = { pointer?: string; detail: string };

/** Over the form: how many problems there are; a press leads to the first. */
export function initProblems(form: HTMLElement): void {
  byId("problems").addEventListener("click", () => focusFirst(form));
}

export function focusFirst(form: HTMLElement): void {
  (form.querySelector<HTMLElement>("[aria-invalid]") ?? byId("yaml")).focus();
}

function count(problems: number): void {
  byId("problems").hidden = problems === 0;
  byId("problems").textContent = problems === 1 ? "1 problem" : `${problems} problems`;
}

export function clearErrors(form: HTMLElement): void {
  count(0);
  for (const field of all("[data-path]", form)) setError(field, "");
  byId("form-errors").hidden = true;
  byId("yaml-errors").replaceChildren();
}

/** Shows the problem's errors. `jump` moves the YAML's caret to a path. */
export function showErrors(form: HTMLElement, spec: PlainObject, problem: Problem, jump: (path: string) => void): void {
  clearErrors(form);
  const errors: FieldProblem[] = problem.errors?.length ? problem.errors : [{ pointer: "", detail: problem.detail || problem.title }];
  const homeless: string[] = [];
  for (const { pointer, detail } of errors) {
    const field = fieldAt(form, spec, pathOf(pointer));
    if (field) setError(field, detail);
    else homeless.push(detail);
  }
  const banner = byId("form-errors");
  banner.textContent = homeless.join(" · ");
  banner.hidden = homeless.length === 0;
  count(errors.length);
  byId("yaml-errors").replaceChildren(...errors.map((error) => errorItem(error, jump)));
}

function errorItem({ pointer, detail }: FieldProblem, jump: (path: string) => void): HTMLElement {
  const path = pathOf(pointer);
  const button = el("button", { type: "button" }, path ? `${path}: ${withoutName(path, detail)}` : detail);
  button.addEventListener("click", () => jump(path));
  return el("li", {}, button);
}

/** A detail begins with the last part of the path: "weights.0: should be …". */
function withoutName(path: string, detail: string): string {
  const [said, name] = detail.match(/^([\w.]+): /) ?? ["", ""];
  return name && `.${path}`.endsWith(`.${name}`) ? detail.slice(said.length) : detail;
}

/** The field of a path; for a path into a list of terms, the field of the term of that kind. */
function fieldAt(form: HTMLElement, spec: PlainObject, path: string): HTMLElement | undefined {
  const shown = (field: Element) => !field.closest("[data-off]");
  const exact = all(`[data-path="${CSS.escape(path)}"]`, form).find((field) => shown(field) && !field.closest("[data-term]"));
  if (exact) return exact;
  const [, list, index, key] = path.match(/^(.*)\.(\d+)(?:\.(\w+))?$/) ?? [];
  const term = list && getPath(spec, `${list}.${index}`);
  if (!isObject(term ?? null)) return undefined;
  const box = form.querySelector(`[data-term="${CSS.escape(String((term as PlainObject).kind))}"]`);
  return box ? all("[data-path]", box).find((field) => !key || field.dataset.path!.endsWith(`.${key}`)) : undefined;
}

function setError(field: HTMLElement, text: string): void {
  const out = field.querySelector<HTMLElement>(".error")!;
  out.textContent = text;
  out.hidden = !text;
  const input = field.querySelector<HTMLElement>("input, select, textarea")!;
  if (text) input.setAttribute("aria-invalid", "true");
  else input.removeAttribute("aria-invalid");
  if (text) field.closest("details")?.setAttribute("open", "");
}
