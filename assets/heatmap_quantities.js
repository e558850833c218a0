// What the heatmap can show: for each quantity its title, unit, how a number is written, and where its colours begin and end.
// `cards`: whether it stands on a card per target, or on cards of its own that a closer look brought along.
const fuseQuantities = (() => {
  'use strict';
  const { exact, scientific, short } = fuseScale;
  const minus = (text) => text.replace('-', '−');
  const percent = (v) => (v === null ? '–' : `${+(100 * v).toPrecision(4)} %`);
  const shortPercent = (v) => (v === 0 ? '0' : 100 * v < 0.05 ? '·' : 100 * v < 9.95 ? (100 * v).toFixed(1) : String(Math.round(100 * v)));
  const tickPercent = (v) => `${+(100 * v).toPrecision(2)} %`;
  const count = (v) => (v === null ? '–' : String(+v.toPrecision(4)));
  const shortCount = (v) => (v < 9.95 ? v.toFixed(1) : v < 999.5 ? String(Math.round(v)) : `${Math.round(v / 1000)}k`);
  const signed = (v) => (v === null ? '–' : minus(String(+v.toPrecision(4))));
  const shortSigned = (v) => (Math.abs(v) > 0.995 ? minus(String(Math.round(v))) : Math.abs(v) < 0.005 ? '0' : minus(v.toFixed(2).replace('0.', '.')));
  const whole = (v, write) => `whole model ${write(v)}`;

  return {
    ratio: { title: 'Ratio', word: 'variation ratio', full: [0, 1], write: exact, short: (v) => short(v, 'ratio'),
      unit: () => 'share of all targets’ change' },
    variation: { title: 'Log variation', word: 'variation', log: true, write: scientific, short: (v) => short(v, 'variation'),
      tick: (v) => v.toExponential(1),
      unit: (data) => `mean ${data.measure === 'square' ? 'square' : 'absolute'} change per parameter, log scale` },
    weight: { title: 'Weight', word: 'merge weight', full: [0, 1], widens: true, write: exact, short: (v) => short(v, 'weight'),
      unit: () => 'weight of the target in the merge' },
    relative: { title: 'Relative change', word: 'relative change', closer: true, write: percent, short: shortPercent, tick: tickPercent,
      head: (v) => whole(v, percent), unit: () => '‖Δ‖ ÷ ‖pivot‖, in %' },
    stable_rank: { title: 'Stable rank', word: 'stable rank of Δ', closer: true, log: true, write: count, unlog: true, short: shortCount,
      tick: (v) => String(+v.toPrecision(2)), head: (v) => `median ${count(v)}`,
      unit: () => 'directions Δ has in effect, ‖Δ‖² ÷ σ₁², per matrix, log scale' },
    lost: { title: 'Rounding loss', word: 'rounding loss', closer: true, from: 0, write: percent, short: shortPercent, tick: tickPercent,
      head: (v) => whole(v, percent), unit: (data) => `share of ‖Δ‖ lost when stored as ${data.closer.dtype}, in %` },
    cosine: { title: 'Cosine', word: 'cosine of two targets’ changes', closer: true, full: [-1, 1], diverging: true, write: signed,
      short: shortSigned, head: (v) => whole(v, signed), unit: () => 'cosine of two targets’ changes: −1 opposed, 0 unrelated, 1 alike' },
    conflict: { title: 'Sign conflict', word: 'sign conflict', closer: true, full: [0, 1], write: percent, short: shortPercent,
      tick: tickPercent, head: (v) => whole(v, percent),
      unit: (data) => `elements moved in opposite directions, in % of those that ${data.targets.length > 2 ? 'two or more' : 'both'} moved` },
  };
})();
