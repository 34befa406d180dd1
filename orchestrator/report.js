"use strict";

// The page is whole without scripts; these add sorting and filtering to its tables.

const byName = new Intl.Collator("en", { numeric: true });

/** What a cell sorts by: a number, a text, or null where nothing was measured. */
function keyOf(row, column) {
  const cell = row.cells[column];
  if (cell.classList.contains("none")) return null;
  return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
}

function compare(first, second) {
  if (typeof first === "number" && typeof second === "number") return first - second;
  return byName.compare(String(first), String(second));
}

/** The rows by a column: upwards, downwards or, for 0, as they came. Missing values stay last. */
function sorted(rows, column, sign) {
  if (sign === 0) return rows;
  const keyed = rows.map((row) => [keyOf(row, column), row]);
  const known = keyed.filter(([key]) => key !== null);
  const missing = keyed.filter(([key]) => key === null);
  known.sort((first, second) => sign * compare(first[0], second[0]));
  return [...known, ...missing].map(([, row]) => row);
}

function makeSortable(table) {
  const body = table.tBodies[0];
  const asWritten = [...body.rows];
  const headers = [...table.tHead.rows[0].cells];
  const next = { null: ["ascending", 1], ascending: ["descending", -1], descending: [null, 0] };
  headers.forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    button.addEventListener("click", () => {
      const [order, sign] = next[header.getAttribute("aria-sort")];
      headers.forEach((each) => each.removeAttribute("aria-sort"));
      if (order) header.setAttribute("aria-sort", order);
      body.append(...sorted(asWritten, column, sign));
    });
    header.append(button);
  });
}

/** Shows the rows that have every word somewhere and every chosen value in its column. */
function makeFilter(form) {
  const rows = [...document.getElementById(form.dataset.table).tBodies[0].rows];
  const texts = new Map(
    rows.map((row) => [row, [...row.cells].map((cell) => cell.textContent).join("\n").toLowerCase()]),
  );
  const search = form.querySelector("input");
  const choices = [...form.querySelectorAll("select")];
  const output = form.querySelector("output");

  function apply() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = choices.filter((choice) => choice.value !== "");
    for (const row of rows) {
      row.hidden = !(
        words.every((word) => texts.get(row).includes(word)) &&
        wanted.every((choice) => row.cells[choice.dataset.column].textContent === choice.value)
      );
    }
    const shown = rows.filter((row) => !row.hidden).length;
    output.value = shown === rows.length ? `${shown} trials` : `${shown} of ${rows.length} trials`;
  }

  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.querySelector("button").addEventListener("click", () => {
    form.reset();
    apply();
    search.focus();
  });
  form.hidden = false;
  apply();
}

document.querySelectorAll("table.sortable").forEach(makeSortable);
document.querySelectorAll("form.filter").forEach(makeFilter);

// Paper cannot be unfolded.
window.addEventListener("beforeprint", () => {
  document.querySelectorAll("details").forEach((each) => (each.open = true));
});
