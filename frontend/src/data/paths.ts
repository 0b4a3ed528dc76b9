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

/** `value` with the keys of its objects, and the kinds of its lists, in the order in which `like` has them; others keep theirs, behind. */
export function inOrderOf(value: Plain, like: Plain | undefined): Plain {
  if (Array.isArray(value) && Array.isArray(like)) {
    const place = (one: Plain) => (like.findIndex((other) => isObject(one) && isObject(other) && other.kind === one.kind) + 1 || Infinity);
    const first = value.filter((one) => place(one) < Infinity).sort((a, b) => place(a) - place(b));
    return [...first, ...value.filter((one) => !first.includes(one))];
  }
  if (!isObject(value)) return value;
  const known = isObject(like) ? Object.keys(like).filter((key) => key in value) : [];
  const keys = [...known, ...Object.keys(value).filter((key) => !known.includes(key))];
  return Object.fromEntries(keys.map((key) => [key, inOrderOf(value[key], isObject(like) ? like[key] : undefined)]));
}

/** "/spec/model/moe/top_k" → "model.moe.top_k"; what does not lie in the spec is left as it is. */
export function pathOf(pointer = ""): string {
  const keys = pointer.split("/").slice(1).map((key) => key.replaceAll("~1", "/").replaceAll("~0", "~"));
  if (keys[0] === "spec") keys.shift();
  return keys.join(".");
}
