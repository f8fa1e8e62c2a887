// The Clopper-Pearson interval, as flawmap.judging.calibration computes it.
function logFactorials(n) {
  const sums = new Float64Array(n + 1);
  for (let i = 1; i <= n; i++) sums[i] = sums[i - 1] + Math.log(i);
  return sums;
}

function binomialCdf(k, n, p, logs) {
  if (p <= 0) return 1;
  if (p >= 1) return k >= n ? 1 : 0;
  const a = Math.log(p);
  const b = Math.log1p(-p);
  let sum = 0;
  for (let i = 0; i <= k; i++) sum += Math.exp(logs[n] - logs[i] - logs[n - i] + i * a + (n - i) * b);
  return Math.min(1, sum);
}

function solve(falling, target) {
  let [low, high] = [0, 1];
  for (let i = 0; i < 60; i++) {
    const middle = (low + high) / 2;
    if (falling(middle) > target) low = middle;
    else high = middle;
  }
  return high;
}

export function binomialInterval(events, n, confidence = 0.95) {
  const tail = (1 - confidence) / 2;
  const logs = logFactorials(n);
  const low = events === 0 ? 0 : solve((p) => binomialCdf(events - 1, n, p, logs), 1 - tail);
  const high = events === n ? 1 : solve((p) => binomialCdf(events, n, p, logs), tail);
  return [low, high];
}

const BINS = 60;
const SHOWN = 40;
const HEIGHT = 320;
const MIDDLE = 150;
const percent = (share) => (100 * share).toFixed(share < 0.1 ? 2 : 1) + " %";
const counted = (count, one, many) => `${count} ${count === 1 ? one : many}`;

export default {
  template: `
    <div class="chart">
      <svg ref="svg" :viewBox="'0 0 ' + width + ' ' + height" aria-label="Scores and threshold" role="group"
           @pointerdown="down" @pointermove="move" @pointerup="held = false" @pointercancel="held = false">
        <rect class="beyond" :x="at(value_)" y="0" :width="Math.max(0, width - at(value_))" :height="height - 26" />
        <g aria-hidden="true">
          <rect v-for="bar in bars" :class="bar.kind" :x="bar.x" :y="bar.y" :width="bar.width" :height="bar.height" />
          <line class="axis" x1="0" :x2="width" :y1="middle" :y2="middle" />
          <text x="4" y="15">{{ counted(good.length, 'good calibration score', 'good calibration scores') }} (above)</text>
          <text x="4" :y="height - 34">last {{ inspected.length }} inspected (below)</text>
          <line class="was" :x1="at(value)" :x2="at(value)" y1="20" :y2="height - 26" />
          <text v-for="tick in ticks" :x="at(tick)" :y="height - 6" text-anchor="middle">{{ tick.toPrecision(3) }}</text>
        </g>
        <g class="handle" ref="handle" tabindex="0" role="slider" aria-label="Threshold" :aria-valuemin="low"
           :aria-valuemax="high" :aria-valuenow="value_" :aria-valuetext="told" @keydown="key"
           :transform="'translate(' + at(value_) + ',0)'">
          <rect class="room" x="-22" y="0" width="44" :height="height - 26" />
          <line x1="0" x2="0" y1="14" :y2="height - 26" />
          <rect class="grip" x="-11" :y="middle - 26" width="22" height="52" rx="8" />
          <path :d="'M-3 ' + (middle - 10) + 'v20M3 ' + (middle - 10) + 'v20'" stroke="#fff" stroke-width="2" />
        </g>
      </svg>
      <div class="figures">
        <div class="figure" data-figure="value"><b>{{ value_.toPrecision(5) }}</b><span>threshold: scores from it on are defects</span></div>
        <div class="figure" data-figure="rate"><b>{{ percent(rate) }}</b><span>of good calibration images are rejected:
          {{ reached }} of {{ good.length }}, 95 % interval {{ percent(interval[0]) }} to {{ percent(interval[1]) }}</span></div>
        <div class="figure" data-figure="rejected"><b>{{ rejected.length }}</b><span>of the last {{ inspected.length }} inspected would
          be rejected; {{ before }} with the threshold in use</span></div>
      </div>
      <div class="chart-tools">
        <button v-if="maySave" type="button" class="button main" :disabled="value_ === value" @click="$emit('save', value_)">
          Save as a new version</button>
        <button type="button" class="button" :disabled="value_ === value" @click="value_ = value">Back to the one in use</button>
      </div>
      <h2>Would be rejected</h2>
      <ul class="rejected">
        <li v-for="one in rejected.slice(0, shown)" :key="one.id">
          <a :href="'/?inspection=' + one.id" :class="'is-' + one.verdict">
            <img v-if="one.thumb" :src="one.thumb" alt="" loading="lazy"><span v-else class="no-thumb"></span>
            <span class="cut">{{ one.name }}</span><span class="quiet">{{ one.score.toPrecision(4) }}</span></a></li>
      </ul>
      <p v-if="!rejected.length" class="quiet">None of them.</p>
      <p v-if="rejected.length > shown" class="quiet">and {{ rejected.length - shown }} more, with lower scores</p>
    </div>`,
  props: { good: Array, inspected: Array, value: Number, maySave: Boolean },
  data() {
    return { value_: this.value, width: 900, height: HEIGHT, middle: MIDDLE, held: false, shown: SHOWN };
  },
  watch: {
    value(now) {
      this.value_ = now;
    },
  },
  mounted() {
    this.observer = new ResizeObserver(([entry]) => (this.width = Math.max(280, entry.contentRect.width)));
    this.observer.observe(this.$refs.svg);
  },
  unmounted() {
    this.observer.disconnect();
  },
  computed: {
    sorted() {
      return [...this.good].sort((a, b) => a - b);
    },
    range() {
      const [low, high] = [this.sorted[0], this.sorted[this.sorted.length - 1]];
      const spread = high - low || Math.abs(high) || 1;
      const scores = this.inspected.map((one) => one.score);
      // What lies far beyond the good ones is drawn at the edge, so that those keep their room.
      const right = Math.min(Math.max(high, this.value, ...scores), Math.max(high, this.value) + 3 * spread);
      const left = Math.max(Math.min(low, this.value, ...scores), Math.min(low, this.value) - spread);
      return [left - 0.04 * (right - left), right + 0.04 * (right - left)];
    },
    low() {
      return this.range[0];
    },
    high() {
      return this.range[1];
    },
    ticks() {
      const count = this.width < 500 ? 3 : 6;
      return Array.from({ length: count }, (_, i) => this.low + ((i + 0.5) / count) * (this.high - this.low));
    },
    bars() {
      const step = (this.high - this.low) / BINS;
      const bin = (score) => Math.min(BINS - 1, Math.max(0, Math.floor((score - this.low) / step)));
      const above = new Array(BINS).fill(0);
      const below = new Array(BINS).fill(0);
      for (const score of this.good) above[bin(score)]++;
      for (const one of this.inspected) below[bin(one.score)]++;
      const width = this.width / BINS;
      const drawn = [];
      const draw = (counts, room, kind, up) => {
        const most = Math.max(1, ...counts);
        counts.forEach((count, i) => {
          if (!count) return;
          const height = Math.max(3, (room * count) / most);
          drawn.push({ kind: kind(i), x: i * width + 1, y: up ? MIDDLE - height : MIDDLE, width: Math.max(1, width - 2), height });
        });
      };
      draw(above, MIDDLE - 28, () => "bar-good", true);
      draw(below, HEIGHT - MIDDLE - 58, (i) => (this.low + (i + 0.5) * step >= this.value_ ? "bar-rejected" : "bar-kept"), false);
      return drawn;
    },
    reached() {
      return this.good.filter((score) => score >= Math.fround(this.value_)).length;
    },
    rate() {
      return this.good.length ? this.reached / this.good.length : 0;
    },
    interval() {
      return binomialInterval(this.reached, this.good.length);
    },
    rejected() {
      const found = this.inspected.filter((one) => one.score >= Math.fround(this.value_));
      return found.sort((a, b) => b.score - a.score);
    },
    before() {
      return this.inspected.filter((one) => one.score >= Math.fround(this.value)).length;
    },
    told() {
      const of = counted(this.rejected.length, "is", "are");
      return `${this.value_.toPrecision(5)}: ${percent(this.rate)} of good calibration images rejected, of the last ${this.inspected.length} inspected ${of} rejected`;
    },
  },
  methods: {
    percent,
    counted,
    at(score) {
      return (Math.min(1, Math.max(0, (score - this.low) / (this.high - this.low)))) * this.width;
    },
    put(score) {
      this.value_ = Math.fround(Math.min(this.high, Math.max(this.low, score)));
    },
    under(event) {
      const box = this.$refs.svg.getBoundingClientRect();
      return this.low + ((event.clientX - box.left) / box.width) * (this.high - this.low);
    },
    down(event) {
      this.held = true;
      this.$refs.svg.setPointerCapture(event.pointerId);
      this.$refs.handle.focus({ preventScroll: true });
      this.put(this.under(event));
      event.preventDefault();
    },
    move(event) {
      if (this.held) this.put(this.under(event));
    },
    key(event) {
      const step = (this.high - this.low) / (event.shiftKey ? 40 : 400);
      const to = {
        ArrowLeft: this.value_ - step, ArrowDown: this.value_ - step, ArrowRight: this.value_ + step, ArrowUp: this.value_ + step,
        PageDown: this.value_ - 20 * step, PageUp: this.value_ + 20 * step, Home: this.low, End: this.high,
      }[event.key];
      if (to === undefined) return;
      this.put(to);
      event.preventDefault();
    },
  },
};
