// The heatmap's tooltip: exact numbers of one cell for every target, by pointer and by keyboard focus. `view` is what
// fuseHeatmap shares with its parts: {data(), grids(), places, where, chosen, editable}. Returns {node, show, hide, again}.
function fuseTip(view) {
  'use strict';
  const { el, exact } = fuseScale;
  const node = el('div', 'hm-tip', undefined, { role: 'tooltip', popover: 'manual' });
  let tipped = null;

  function show(cell) {
    hide();
    const at = view.places.get(cell);
    if (!at) return;
    tipped = cell;
    node.replaceChildren(...(at.i >= 0 ? cellTip(at) : headTip(at)));
    node.showPopover?.();
    move();
    light(at, true);
    window.addEventListener('scroll', onScroll, { capture: true, once: true, passive: true });
  }
  function hide() {
    if (!tipped) return;
    const at = view.places.get(tipped);
    tipped = null;
    window.removeEventListener('scroll', onScroll, { capture: true });
    if (node.isConnected) node.hidePopover?.();
    if (at) light(at, false);
  }
  function onScroll() {
    if (!tipped?.isConnected) return hide();
    move();
    window.addEventListener('scroll', onScroll, { capture: true, once: true, passive: true });
  }
  function move() {
    const cell = tipped.getBoundingClientRect();
    const box = node.getBoundingClientRect();
    const above = cell.top - box.height - 8;
    node.style.top = `${above > 4 ? above : cell.bottom + 8}px`;
    node.style.left = `${Math.max(6, Math.min(cell.left + cell.width / 2 - box.width / 2, innerWidth - box.width - 6))}px`;
  }
  // The row's and column's names light up, and so does the same cell of every other target.
  function light({ grid, r, c }, on) {
    grid.at[r + 1][0]?.classList.toggle('hm-lit', on);
    grid.at[0][c + 1]?.classList.toggle('hm-lit', on);
    for (const other of view.grids()) {
      if (other !== grid && other.b === grid.b && r >= 0 && c >= 0) other.at[r + 1][c + 1]?.classList.toggle('hm-twin', on);
    }
  }

  // One row for each quantity that is known, one column for each target.
  function cellTip({ grid, i }) {
    const data = view.data();
    const block = data.blocks[grid.b];
    const experts = block.count[i] > 1;
    const facts = `${block.shape[i]}${experts ? `, ${block.count[i]} of them` : ''} · per ${data.granularity}`;
    const head = el('tr');
    head.append(el('th'), ...data.targets.map((target, t) => {
      const name = el('th', t === grid.t ? 'hm-this' : '');
      const dot = el('span', 'hm-dot');
      dot.style.backgroundColor = target.color;
      name.append(dot, `${target.letter} `, el('span', 'hm-who', target.name));
      return name;
    }));
    const table = el('table');
    table.append(head, ...Object.entries(fuseQuantities).filter(([name, its]) => !its.closer || perTarget(name)).map(([name, its]) => {
      const row = el('tr');
      row.append(el('th', '', its.closer ? its.title.toLowerCase() : name), ...data.targets.map((_, t) => {
        const values = block.values[t];
        const v = its.closer ? block.closer[name][t][i] : values[name][i];
        const more = name === 'weight' && values.fixed[i] ? ' fixed' : name === 'ratio' && values.error ? ` ± ${exact(2 * values.error[i])}` : '';
        return el('td', t === grid.t ? 'hm-this' : '', its.write(v) + more);
      }));
      return row;
    }));
    const notes = together(block, i);
    if (experts) notes.push(`Mean of ${block.count[i]} matrices; an edit applies to all of them.`);
    if (block.excluded[i]) notes.push('Kept from pivot: not merged.');
    return [el('div', 'hm-tensor', block.name[i]), el('div', 'hm-facts', facts), table,
      ...notes.map((note) => el('div', 'hm-note', note))];
  }
  const perTarget = (name) => view.data().closer?.cards[name]?.some((card) => card.target !== null);

  // What belongs to several targets at once, in words.
  function together(block, i) {
    const cards = view.data().closer?.cards || {};
    return ['lost', 'cosine', 'conflict'].flatMap((name) => (cards[name] || []).flatMap((card, k) => {
      if (card.target !== null) return [];
      const whose = name === 'cosine' ? `cosine ${card.letters[0]}·${card.letters[1]}` : name === 'lost' ? 'rounding loss of their average' : 'sign conflict';
      return [`${whose} ${fuseQuantities[name].write(block.closer[name][k][i])}`];
    }));
  }

  function headTip({ grid, r, c }) {
    const { length } = view.chosen(grid, r, c);
    const cells = `${length} ${length === 1 ? 'cell' : 'cells'}`;
    const facts = grid.t < 0 ? cells : `${cells} of target ${view.data().targets[grid.t].letter}`;
    return [el('div', 'hm-tensor', view.where(grid, r, c)),
      el('div', 'hm-facts', view.editable(grid) ? `${facts} · click to edit them together` : facts)];
  }

  return { node, show, hide, again: () => tipped && show(tipped) };
}
