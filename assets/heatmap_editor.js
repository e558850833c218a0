// The heatmap's editor: a dialog beside the cell, row or column it edits. `view` is what fuseHeatmap shares with its parts;
// `request(at, action, weight)` carries the answer. Returns {node, open(at)}.
function fuseEditor(view, request) {
  'use strict';
  const { el, exact, ink, short } = fuseScale;
  const id = `hm-editor-${Math.random().toString(36).slice(2)}`;
  const node = el('dialog', 'hm-editor', undefined, { 'aria-labelledby': id });
  const form = el('form', '', undefined, { method: 'dialog' });
  const title = el('div', 'hm-editing', '', { id });
  const facts = el('div', 'hm-facts');
  const slider = el('input', '', undefined, { type: 'range', min: 0, max: 1, step: 0.01, 'aria-label': 'Weight, slider' });
  const number = el('input', '', undefined, { type: 'number', min: 0, max: 1, step: 'any', required: '', 'aria-label': 'Weight' });
  const preview = el('div', 'hm-preview');
  const close = el('button', 'hm-close', '×', { type: 'button', 'aria-label': 'Close' });
  const set = el('button', 'hm-primary', 'Set', { type: 'submit' });
  const lock = el('button', '', 'Lock at present value', { type: 'button' });
  const reset = el('button', '', 'Reset', { type: 'button' });
  const [inputs, buttons] = [el('div', 'hm-inputs'), el('div', 'hm-buttons')];
  inputs.append(slider, number);
  buttons.append(set, lock, reset);
  form.append(title, close, facts, inputs, preview, buttons);
  node.append(form);
  let at = null;

  const finish = (action, weight) => { node.close(); request(at, action, weight); };
  slider.addEventListener('input', () => { number.value = slider.value; drawPreview(); });
  number.addEventListener('input', () => { slider.value = number.value; drawPreview(); });
  form.addEventListener('submit', (event) => { event.preventDefault(); finish('set', number.valueAsNumber); });
  lock.addEventListener('click', () => finish('lock', null));
  reset.addEventListener('click', () => finish('reset', null));
  close.addEventListener('click', () => node.close());
  // A press on the backdrop has the dialog itself as its target.
  node.addEventListener('pointerdown', (event) => { if (event.target === node) node.close(); });

  function drawPreview() {
    const { grid, i } = at;
    const others = view.data().targets.map((_, t) => t).filter((t) => t !== grid.t);
    if (!others.length) return preview.replaceChildren('The only target: whatever its weight, the merge is this target.');
    const lines = [el('div', '', 'The other targets share the rest in proportion.')];
    const values = i < 0 ? [] : view.data().blocks[grid.b].values;
    if (i >= 0 && number.validity.valid && !others.some((t) => values[t].fixed[i])) {
      const sum = others.reduce((total, t) => total + (values[t].weight[i] || 0), 0);
      const mine = number.valueAsNumber;
      const bar = el('div', 'hm-shares', undefined, { 'aria-hidden': 'true' });
      view.data().targets.forEach((target, t) => {
        const share = t === grid.t ? mine : (1 - mine) * (sum ? (values[t].weight[i] || 0) / sum : 1 / others.length);
        const part = el('span', '', share > 0.12 ? `${target.letter} ${short(share, 'weight')}` : '');
        part.style.flexGrow = share;
        part.style.backgroundColor = target.color;
        part.style.color = ink(target.color);
        bar.append(part);
      });
      lines.push(bar);
    }
    preview.replaceChildren(...lines);
  }

  function open(where) {
    at = where;
    const { grid, r, c, i } = at;
    const block = view.data().blocks[grid.b];
    const { letter, name } = view.data().targets[grid.t];
    const cells = view.chosen(grid, r, c);
    if (!cells.length) return request(at, 'lock', null);
    const weights = cells.map((k) => block.values[grid.t].weight[k]).filter((v) => v !== null);
    const now = weights.length ? weights.reduce((sum, v) => sum + v, 0) / weights.length : 0.5;
    title.textContent = i >= 0 ? block.name[i] : view.where(grid, r, c);
    const many = cells.length > 1 ? `mean weight of ${cells.length} cells` : 'weight';
    facts.textContent = `Target ${letter}, ${name} · ${many} now ${exact(now)}`;
    number.value = slider.value = +now.toFixed(4);
    drawPreview();
    node.showModal();
    number.select();
    const anchor = grid.at[r + 1][c + 1].getBoundingClientRect();
    const box = node.getBoundingClientRect();
    const below = anchor.bottom + 8 + box.height < innerHeight;
    node.style.top = `${below ? anchor.bottom + 8 : Math.max(8, anchor.top - box.height - 8)}px`;
    node.style.left = `${Math.max(8, Math.min(anchor.left, innerWidth - box.width - 8))}px`;
  }
  return { node, open };
}
