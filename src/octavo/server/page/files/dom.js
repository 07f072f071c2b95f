/** Build DOM nodes. Text becomes text nodes; nothing is parsed as HTML. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * Make an element.
 * @param {string} tag Its name, with classes after dots: "button.icon".
 * @param {Object} [attributes] A function is a listener of the event with that name; null and false are left out.
 * @param {...(Node|string|null|false)} children
 */
export function h(tag, attributes = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElement(name);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(key, value);
    else if (value !== null && value !== undefined && value !== false)
      element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Make an icon of the sprite in index.html. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** Make a button that shows an icon only; `label` is what screen readers and a tooltip say. */
export function iconButton(name, label, click, attributes = {}) {
  return h("button.icon", { type: "button", "aria-label": label, title: label, click, ...attributes }, icon(name));
}

/**
 * Show a modal dialog.
 * @param {string} title
 * @param {(close: (result: any) => void) => Node[]} build Returns the contents.
 * @returns {Promise<any>} What `close` was called with; undefined if the dialog was dismissed.
 */
export function dialog(title, build) {
  return new Promise((resolve) => {
    const box = h("dialog", {
      "aria-label": title,
      close: () => {
        box.remove();
        resolve(box.result);
      },
    });
    const close = (result) => {
      box.result = result;
      box.close();
    };
    box.append(
      h(
        "header",
        {},
        h("h2", {}, title),
        iconButton("close", "Close", () => close()),
      ),
      ...build(close),
    );
    box.addEventListener("click", (event) => event.target === box && close());
    document.body.append(box);
    box.showModal();
  });
}

/** Ask for a confirmation. Resolves to true if it is given. */
export function confirm(title, text, action) {
  return dialog(title, (close) => [
    h("p", {}, text),
    h(
      "div.actions",
      {},
      h("button", { type: "button", click: () => close(false) }, "Cancel"),
      h("button.danger", { type: "button", autofocus: true, click: () => close(true) }, action),
    ),
  ]);
}

let toastTimer;

/** Show a line of text for some seconds, which screen readers say. */
export function toast(text) {
  let box = document.getElementById("toast");
  if (!box) document.body.append((box = h("div", { id: "toast", role: "status" })));
  box.textContent = text;
  box.classList.add("shown");
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => box.classList.remove("shown"), 2600);
}
