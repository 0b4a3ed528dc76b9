/** The form and the spec: reads the fields into plain data and writes plain data into the fields. */
import { getPath, isObject, setPath, type Plain, type PlainObject } from "../data/paths";
import { all } from "./dom";

type Input = HTMLInputElement | HTMLSelectElement | HTMLTextAreaElement;

const fieldsOf = (root: ParentNode): HTMLElement[] => all("[data-path]", root);
/** A field counts where no part around it is switched off. */
const active = (field: Element): boolean => !field.closest("[data-off]");

/** The spec as the form has it. Text that is no number stays text: the server says what is wrong with it. */
export function readForm(form: HTMLElement): PlainObject {
  const spec: PlainObject = {};
  for (const part of all("[data-part], [data-union]", form)) if (active(part)) setPath(spec, (part.dataset.part ?? part.dataset.union)!, {});
  for (const part of all("[data-optional]", form)) if (active(part)) setPath(spec, part.dataset.optional!, isOn(part) ? {} : null);
  for (const union of all("[data-union]", form)) if (active(union)) setPath(spec, `${union.dataset.union}.kind`, union.querySelector<HTMLSelectElement>("[data-kind]")!.value);
  for (const terms of all("[data-terms]", form)) if (active(terms)) setPath(spec, terms.dataset.terms!, readTerms(terms));
  for (const field of fieldsOf(form)) if (active(field) && !field.closest("[data-term]")) setPath(spec, field.dataset.path!, readField(field));
  return spec;
}

function readTerms(terms: HTMLElement): Plain[] {
  return all("[data-term]", terms)
    .filter(isOn)
    .map((term) => ({ kind: term.dataset.term!, ...Object.fromEntries(fieldsOf(term).map((field) => [keyOf(field), readField(field)])) }));
}

const keyOf = (field: HTMLElement): string => field.dataset.path!.split(".").at(-1)!;
const isOn = (part: HTMLElement): boolean => part.querySelector<HTMLInputElement>("[data-switch]")!.checked;

function readField(field: HTMLElement): Plain {
  const input = field.querySelector<Input>("[data-value]")!;
  const [kind, nullable] = input.dataset.value!.split("-");
  if (kind === "bool") return (input as HTMLInputElement).checked;
  if (kind === "choices") return all<HTMLInputElement>("input:checked", input).map((box) => box.value);
  if (kind === "lines") return input.value.split("\n").map((line) => line.trim()).filter(Boolean);
  const text = input.value.trim();
  if (nullable && !text) return null;
  if (kind !== "int" && kind !== "number") return input.value;
  const number = Number(text.replaceAll("_", "").replaceAll(",", ""));
  return text && Number.isFinite(number) ? number : text;
}

/** Shows `spec` in the form. What it leaves out is as in `defaults`, and hidden parts are as new: nothing stays of what stood there before. */
export function writeForm(form: HTMLElement, spec: PlainObject, defaults: PlainObject): void {
  for (const input of all<Input>("input, select, textarea", form)) if (input.closest("[data-path], [data-optional], [data-union], [data-terms]")) renew(input);
  const value = (path: string): Plain | undefined => getPath(spec, path) ?? (getPath(spec, path) === null ? null : getPath(defaults, path));
  for (const part of all("[data-optional]", form)) part.querySelector<HTMLInputElement>("[data-switch]")!.checked = isObject(value(part.dataset.optional!));
  for (const union of all("[data-union]", form)) {
    const kind = getPath(spec, `${union.dataset.union}.kind`) ?? getPath(defaults, `${union.dataset.union}.kind`);
    if (typeof kind === "string") union.querySelector<HTMLSelectElement>("[data-kind]")!.value = kind;
  }
  for (const terms of all("[data-terms]", form)) writeTerms(terms, value(terms.dataset.terms!));
  // Twice: what the first pass writes decides which other fields there are.
  for (let pass = 0; pass < 2; pass++) {
    showParts(form);
    for (const field of fieldsOf(form)) {
      const held = value(field.dataset.path!);
      if (active(field) && !field.closest("[data-term]") && held !== undefined) writeField(field, held);
    }
  }
  showParts(form);
}

/** Gives `input` what the page was written with. */
function renew(input: Input): void {
  if (input instanceof HTMLSelectElement) input.selectedIndex = Math.max([...input.options].findIndex((option) => option.defaultSelected), 0);
  else if (input.type === "checkbox") (input as HTMLInputElement).checked = (input as HTMLInputElement).defaultChecked;
  else input.value = input.defaultValue;
}

function writeTerms(terms: HTMLElement, list: Plain | undefined): void {
  for (const term of all("[data-term]", terms)) {
    const held = Array.isArray(list) ? list.find((one) => isObject(one) && one.kind === term.dataset.term) : undefined;
    term.querySelector<HTMLInputElement>("[data-switch]")!.checked = held !== undefined;
    if (isObject(held)) for (const field of fieldsOf(term)) if (held[keyOf(field)] !== undefined) writeField(field, held[keyOf(field)]);
  }
}

function writeField(field: HTMLElement, value: Plain): void {
  const input = field.querySelector<Input>("[data-value]")!;
  const kind = input.dataset.value!.split("-")[0];
  if (kind === "bool") (input as HTMLInputElement).checked = value === true;
  else if (kind === "choices") for (const box of all<HTMLInputElement>("input", input)) box.checked = Array.isArray(value) && value.includes(box.value);
  else input.value = Array.isArray(value) ? value.join("\n") : value === null ? "" : String(value);
}

/** Hides what the choices leave out; hidden parts are not read. */
export function showParts(form: HTMLElement): void {
  const set = (node: HTMLElement, on: boolean) => {
    node.hidden = !on;
    node.toggleAttribute("data-off", !on);
  };
  for (const part of all("[data-optional], [data-term]", form)) set(part.querySelector<HTMLElement>("[data-body]")!, isOn(part));
  for (const union of all("[data-union]", form)) {
    const kind = union.querySelector<HTMLSelectElement>("[data-kind]")!.value;
    for (const variant of all("[data-variant]", union)) set(variant, variant.dataset.variant === kind);
  }
  for (const field of all("[data-when]", form)) {
    const decides = form.querySelector<HTMLSelectElement>(`[data-path="${field.dataset.whenPath}"] [data-value]`);
    set(field, decides === null || field.dataset.when!.split(" ").includes(decides.value));
  }
  for (const help of all("[data-option-help]", form)) {
    const chosen = help.closest("[data-path]")!.querySelector<HTMLSelectElement>("select")!.selectedOptions[0];
    help.textContent = chosen?.dataset.help ?? "";
  }
}
