// Making and updating elements. Text goes in as text, never as markup.

/** The element of this id. */
export const byId = (id) => document.getElementById(id);

/**
 * A new element.
 *
 * @param {string} tag
 * @param {string} [className]
 * @param {...(Node|string)} children
 */
export function make(tag, className = "", ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

/** Set an element's text, leaving it alone (and the reader's selection) when it is the same. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Show a sentence in an element that is hidden while there is none. */
export function sayOrHide(element, text) {
  say(element, text ?? "");
  element.hidden = !text;
}

/**
 * Give `parent` one child per item, in order; a child lives as long as its item's key does.
 *
 * @template T
 * @param {Element} parent
 * @param {T[]} items
 * @param {(item: T, index: number) => string} key
 * @param {(item: T) => Element} create
 * @param {(element: Element, item: T, index: number) => void} update
 */
export function keep(parent, items, key, create, update) {
  const old = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  items.forEach((item, index) => {
    const name = key(item, index);
    const child = old.get(name) ?? create(item);
    old.delete(name);
    child.dataset.key = name;
    update(child, item, index);
    const there = parent.children[index] ?? null;
    if (there !== child) parent.insertBefore(child, there);
  });
  for (const child of old.values()) child.remove();
}
