/** Values in plain data by dotted path, and JSON pointers as paths. */

export type Plain = null | boolean | number | string | Plain[] | { [key: string]: Plain };
export type PlainObject = { [key: string]: Plain };

export const isObject = (value: unknown): value is PlainObject => typeof value === "object" && value !== null && !Array.isArray(value);

export function getPath(root: Plain, path: string): Plain | undefined {
  let here: Plain | undefined = root;
  for (const key of path ? path.split(".") : []) {
    if (Array.isArray(here)) here = here[Number(key)];
    else if (isObject(here)) here = here[key];
    else return undefined;
  }
  return here;
}

/** Sets the value at `path`, making the objects on the way. */
export function setPath(root: PlainObject, path: string, value: Plain): void {
  const keys = path.split(".");
  let here = root;
  for (const key of keys.slice(0, -1)) {
    if (!isObject(here[key])) here[key] = {};
    here = here[key] as PlainObject;
  }
  here[keys[keys.length - 1]] = value;
}

/** "/spec/model/moe/top_k" → "model.moe.top_k"; what does not lie in the spec is left as it is. */
export function pathOf(pointer: string): string {
  const keys = pointer.split("/").slice(1).map((key) => key.replaceAll("~1", "/").replaceAll("~0", "~"));
  if (keys[0] === "spec") keys.shift();
  return keys.join(".");
}
