// Draws the alignment of components/fusing/figure.py into `root` and returns {update(value)}. The reply flows in groups: above
// the pivot's tokens, below the source's, between them their links; a group is never broken, lines are. Texts only ever enter
// the page as textContent, and no listener outlives `root`.
function fuseAlignment(root) {
  'use strict';

  const SVG = 'http://www.w3.org/2000/svg';
  const HEIGHT = 26;
  let data = null;
  let chips = { pivot: [], source: [] };
  let lines = []; // {node, i, j} of every link
  let chosen = -1;

  function el(tag, name, text, attributes = {}) {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text !== undefined) node.textContent = text;
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    return node;
  }
  const percent = (share) => (share >= 0.995 ? '100 %' : share < 0.0005 ? '< 0.1 %' : `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`);
  // A token as people can see it: spaces and line ends have marks.
  const seen = (text) => text.replaceAll(' ', '␣').replaceAll('\n', '⏎').replaceAll('\t', '⇥');
  const who = (its) => (its.chosen ? data.source : data.pivot);

  // ---------------------------------------------------------------- parts that stay
  const facts = el('dl', 'al-facts');
  const key = el('div', 'al-key');
  const flow = el('div', 'al-flow', undefined, { role: 'group' });
  const card = el('aside', 'al-card', undefined, { 'aria-live': 'polite' });
  const notice = el('p', 'al-notice');
  const body = el('div', 'al-body');
  body.append(flow, card);
  root.replaceChildren(notice, facts, key, body);

  // ---------------------------------------------------------------- drawing
  function update(value) {
    data = value && value.positions ? value : null;
    notice.textContent = data ? '' : (value && value.problem) || 'Pick a pivot and a source, and press Show.';
    notice.hidden = Boolean(data);
    for (const part of [facts, key, body]) part.hidden = !data;
    if (!data) return;
    root.style.setProperty('--al-source', data.source.color);
    root.style.setProperty('--al-source-ink', data.source.ink);
    drawFacts();
    drawKey();
    drawFlow();
    show(mostTelling());
    requestAnimationFrame(link);
  }

  // What is worth seeing first: where the source is heard and most of its words are lost or written otherwise, else where it is heard.
  function mostTelling() {
    return data.positions.reduce((best, its, i) => (its.chosen && (!data.positions[best].chosen || its.other > data.positions[best].other) ? i : best), 0);
  }
  function drawFacts() {
    facts.replaceChildren(...data.facts.map((fact) => {
      const part = el('div');
      part.append(el('dd', '', fact.value), el('dt', '', fact.text));
      return part;
    }));
  }

  function drawKey() {
    const model = (its, side) => {
      const part = el('span');
      part.append(el('i', `al-letter al-by-${side}`, its.letter), el('span', '', its.name));
      return part;
    };
    const line = (name, text) => {
      const part = el('span');
      part.append(el('i', `al-stroke ${name}`), el('span', '', text));
      return part;
    };
    key.replaceChildren(model(data.pivot, 'pivot'), model(data.source, 'source'),
      line('al-solid', 'starts at the same letter'), line('al-dashed', 'same text, another cut'));
  }

  function drawFlow() {
    chips = { pivot: [], source: [] };
    lines = [];
    const used = new Set(data.positions.map((its) => its.source));
    flow.setAttribute('aria-label', `The reply in tokens of ${data.pivot.name}, above, and of ${data.source.name}, below`);
    flow.replaceChildren(...data.groups.map((group) => {
      const node = el('div', 'al-group');
      const above = el('div', 'al-row');
      const below = el('div', 'al-row');
      for (const i of group.pivot) above.append(pivotChip(i));
      for (const j of group.source) below.append(sourceChip(j, used.has(j)));
      const svg = document.createElementNS(SVG, 'svg');
      svg.setAttribute('class', 'al-links');
      svg.setAttribute('height', HEIGHT);
      svg.setAttribute('aria-hidden', 'true');
      for (const [i, j] of group.links) {
        const path = document.createElementNS(SVG, 'path');
        path.setAttribute('class', data.positions[i].source === j && !data.positions[i].inside ? 'al-solid' : 'al-dashed');
        svg.append(path);
        lines.push({ node: path, svg, i, j });
      }
      node.append(above, svg, below);
      return node;
    }));
  }

  function pivotChip(i) {
    const its = data.positions[i];
    const chip = el('button', `al-chip al-by-${its.chosen ? 'source' : 'pivot'}`, undefined, {
      type: 'button', tabindex: -1, 'aria-label': `${seen(its.text)}, taught by ${who(its).name}` });
    chip.append(el('span', its.mark ? 'al-text al-mark' : 'al-text', seen(its.text)), el('i', 'al-letter', who(its).letter));
    chips.pivot[i] = chip;
    listen(chip, 'pivot', i);
    return chip;
  }
  function sourceChip(j, heard) {
    const token = data.tokens[j];
    const chip = el('button', `al-chip al-theirs${heard ? '' : ' al-idle'}`, undefined, {
      type: 'button', tabindex: -1, 'aria-label': `${seen(token.text)} of ${data.source.name}` });
    chip.append(el('span', token.mark ? 'al-text al-mark' : 'al-text', seen(token.text)));
    chips.source[j] = chip;
    listen(chip, 'source', j);
    return chip;
  }

  // Links are laid when the browser knows where the tokens stand; inside a group they never move again.
  function link() {
    for (const { node, svg, i, j } of lines) {
      const from = chips.pivot[i];
      const to = chips.source[j];
      if (!from || !to || !from.offsetWidth) return;
      const left = svg.getBoundingClientRect().left;
      const middle = (chip) => { const box = chip.getBoundingClientRect(); return box.left + box.width / 2 - left; };
      const [a, b] = [middle(from), middle(to)];
      node.setAttribute('d', `M${a},0 C${a},${HEIGHT / 2} ${b},${HEIGHT / 2} ${b},${HEIGHT}`);
    }
  }
  new ResizeObserver(() => link()).observe(flow);

  // ---------------------------------------------------------------- choosing a token
  function positionOf(side, n) {
    if (side === 'pivot') return n;
    const heard = data.positions.findIndex((its) => its.source === n);
    return heard >= 0 ? heard : (lines.find(({ j }) => j === n)?.i ?? -1);
  }
  function listen(chip, side, n) {
    const open = () => show(positionOf(side, n));
    chip.addEventListener('pointerenter', open);
    chip.addEventListener('focus', open);
    chip.addEventListener('click', open);
    chip.addEventListener('keydown', (event) => {
      const row = chips[side];
      const other = side === 'pivot' ? lines.find(({ i }) => i === n)?.j : positionOf(side, n);
      const to = { ArrowRight: row[n + 1], ArrowLeft: row[n - 1], Home: row[0], End: row.at(-1),
        ArrowDown: side === 'pivot' ? chips.source[other] : undefined, ArrowUp: side === 'source' ? chips.pivot[other] : undefined };
      if (!(event.key in to)) return;
      event.preventDefault();
      to[event.key]?.focus();
    });
  }
  function show(i) {
    if (!data || !data.positions[i]) return;
    chosen = i;
    const its = data.positions[i];
    chips.pivot.forEach((chip, n) => { chip.classList.toggle('al-on', n === i); chip.tabIndex = n === i ? 0 : -1; });
    chips.source.forEach((chip, n) => chip.classList.toggle('al-on', n === its.source));
    for (const line of lines) line.node.classList.toggle('al-on', line.i === i);
    card.replaceChildren(...cardOf(its, i));
  }

  // ---------------------------------------------------------------- the card
  function cardOf(its, i) {
    const before = data.positions.slice(Math.max(0, i - 8), i).map((one) => one.text).join('');
    const head = el('div', 'al-head');
    const said = el('p', 'al-said');
    said.append(el('span', 'al-before', before ? `…${before}` : 'At the start of the reply: '), el('b', its.mark ? 'al-mark' : '', seen(its.text)));
    const tag = el('span', `al-tag al-by-${its.chosen ? 'source' : 'pivot'}`);
    tag.append(el('i', 'al-letter', who(its).letter), el('span', '', `taught by ${who(its).name}`));
    head.append(said, tag);
    const both = el('div', 'al-both');
    both.append(distribution(data.pivot.name, its.pivot, 'pivot', its.nats[0]),
      distribution(`${data.source.name}, in the pivot's tokens`, its.mapped, 'source', its.nats[1], its.source < 0));
    return [head, el('p', 'al-why', its.why), both, ...lost(its)];
  }

  function distribution(name, entries, side, nats, silent = false) {
    const part = el('div', `al-dist al-by-${side}`);
    part.append(el('h3', '', name));
    if (!entries.length) part.append(el('p', 'al-none', silent ? 'No prediction at this place.' : 'Nothing is left after mapping.'));
    for (const entry of entries) {
      const row = el('div', entry.gold ? 'al-entry al-gold' : 'al-entry');
      const bar = el('span', 'al-bar');
      const fill = el('i');
      fill.style.width = `${Math.max(1, 100 * entry.chance)}%`;
      bar.append(fill);
      row.append(el('code', '', seen(entry.text)), bar, el('small', '', percent(entry.chance)));
      if (entry.gold) row.append(el('span', 'al-sr', ' (the true token)'));
      part.append(row);
    }
    if (nats !== null) part.append(el('p', 'al-nats', `−log p of the true text: ${nats < 0.0005 ? '< 0.001' : nats.toFixed(nats < 0.095 ? 3 : 2)} nats`));
    return part;
  }

  function lost(its) {
    if (its.source < 0) return [];
    const part = el('div', 'al-lost');
    if (its.words.length) {
      part.append(el('p', '', `Lost on the way: ${percent(its.lost)} of what ${data.source.name} expects. The rest keeps its mass, ${percent(its.kept)} out of all.`),
        chipsOf(its.words, ({ becomes }) => (becomes === null ? 'no pivot token' : `a second ${seen(becomes)}`)));
    } else part.append(el('p', '', `Nothing was lost: every token ${data.source.name} expects has a pivot token.`));
    if (its.respelt.length) {
      part.append(el('p', '', `${data.pivot.name} writes these otherwise, so they count for the token that begins them:`),
        chipsOf(its.respelt, ({ becomes }) => `for ${seen(becomes)}`));
    }
    if (its.pieces.length) {
      part.append(el('p', '', `${data.source.name} writes ${seen(its.text)} in several tokens; it gets the chance of all together:`),
        chipsOf(its.pieces.map((text) => ({ text }))));
    }
    return [part];
  }
  function chipsOf(words, fate) {
    const list = el('p', 'al-words');
    for (const word of words) {
      const chip = el('span');
      chip.append(el('code', '', seen(word.text)));
      if (fate) chip.append(el('small', '', `${percent(word.chance)} · ${fate(word)}`));
      list.append(chip);
    }
    return list;
  }

  return { update };
}
