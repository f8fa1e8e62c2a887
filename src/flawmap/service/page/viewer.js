const STEP = 1.25;
const MOST = 24;

export default {
  template: `
    <div class="viewer">
      <div class="stage" ref="stage" tabindex="0" role="group"
           :aria-label="'Picture of ' + name + '. Plus, minus and 0 zoom, Shift and arrows move it.'"
           @wheel.prevent="wheel" @pointerdown="down" @pointermove="move" @pointerup="up" @pointercancel="up"
           @dblclick="fit">
        <p v-if="!picture" class="no-picture">{{ told }}</p>
        <div v-else class="world" :style="{ transform: 'translate(' + x + 'px,' + y + 'px) scale(' + scale + ')' }">
          <img :src="picture" :alt="'Picture of ' + name" ref="image" draggable="false" @load="loaded">
          <img v-if="heat" v-show="shown" :src="heat" alt="" class="heat" draggable="false"
               :style="{ opacity: opacity / 100 }">
          <img v-if="outlines && outlined" :src="outlines" alt="" class="outlines" draggable="false">
        </div>
      </div>
      <div class="tools" role="group" aria-label="Heatmap and zoom">
        <label class="tool"><input type="checkbox" v-model="shown"> Heat</label>
        <label class="tool opacity">Opacity
          <input type="range" min="0" max="100" v-model.number="opacity" :disabled="!shown"
                 :aria-valuetext="opacity + ' percent'"></label>
        <label class="tool"><input type="checkbox" v-model="outlined"> Outlines</label>
        <span class="zoom">
          <button type="button" @click="zoom(1 / STEP)" aria-label="Zoom out">−</button>
          <output aria-label="Zoom">{{ Math.round(scale * 100) }} %</output>
          <button type="button" @click="zoom(STEP)" aria-label="Zoom in">+</button>
          <button type="button" @click="fit" aria-label="Show the whole picture">Fit</button>
        </span>
      </div>
    </div>`,
  props: { picture: String, heat: String, outlines: String, name: String, told: String },
  data: () => ({ scale: 1, x: 0, y: 0, opacity: 100, shown: true, outlined: true, STEP }),
  watch: {
    picture() {
      this.fit();
    },
  },
  mounted() {
    document.addEventListener("keydown", this.key);
    this.pointers = new Map();
  },
  unmounted() {
    document.removeEventListener("keydown", this.key);
  },
  methods: {
    loaded() {
      this.$refs.stage.dataset.loaded = this.picture;
    },
    fit() {
      this.scale = 1;
      this.x = this.y = 0;
    },
    // Zooms about a point of the stage, given from its middle: what is there stays there.
    zoom(factor, px = 0, py = 0) {
      const scale = Math.min(MOST, Math.max(1, this.scale * factor));
      this.x = px - ((px - this.x) * scale) / this.scale;
      this.y = py - ((py - this.y) * scale) / this.scale;
      this.scale = scale;
      this.keepInside();
    },
    keepInside() {
      const { clientWidth, clientHeight } = this.$refs.stage;
      const far = (side) => ((this.scale - 1) * side) / 2;
      this.x = Math.min(far(clientWidth), Math.max(-far(clientWidth), this.x));
      this.y = Math.min(far(clientHeight), Math.max(-far(clientHeight), this.y));
    },
    fromMiddle(event) {
      const box = this.$refs.stage.getBoundingClientRect();
      return [event.clientX - box.left - box.width / 2, event.clientY - box.top - box.height / 2];
    },
    wheel(event) {
      this.zoom(Math.exp(-event.deltaY * 0.0015), ...this.fromMiddle(event));
    },
    down(event) {
      this.$refs.stage.setPointerCapture(event.pointerId);
      this.pointers.set(event.pointerId, [event.clientX, event.clientY]);
    },
    move(event) {
      const before = this.pointers.get(event.pointerId);
      if (!before) return;
      if (this.pointers.size === 2) {
        const [other] = [...this.pointers].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
        const was = Math.hypot(before[0] - other[0], before[1] - other[1]);
        const is = Math.hypot(event.clientX - other[0], event.clientY - other[1]);
        if (was > 0) this.zoom(is / was, ...this.fromMiddle(event));
      } else {
        this.x += event.clientX - before[0];
        this.y += event.clientY - before[1];
        this.keepInside();
      }
      this.pointers.set(event.pointerId, [event.clientX, event.clientY]);
    },
    up(event) {
      this.pointers.delete(event.pointerId);
    },
    key(event) {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.target.closest?.("input, textarea, select, [role=slider], [role=combobox]")) return;
      const side = 80;
      const moves = { ArrowLeft: [side, 0], ArrowRight: [-side, 0], ArrowUp: [0, side], ArrowDown: [0, -side] };
      if (event.key === "+" || event.key === "=") this.zoom(STEP);
      else if (event.key === "-") this.zoom(1 / STEP);
      else if (event.key === "0") this.fit();
      else if (event.shiftKey && moves[event.key]) {
        this.x += moves[event.key][0];
        this.y += moves[event.key][1];
        this.keepInside();
      } else return;
      event.preventDefault();
    },
    lookAt(box) {
      const image = this.$refs.image;
      if (!image || !image.naturalWidth) return;
      const { clientWidth, clientHeight } = this.$refs.stage;
      const unit = Math.min(clientWidth / image.naturalWidth, clientHeight / image.naturalHeight);
      const [left, top, right, bottom] = box;
      const room = 3 * unit * Math.max(right - left, bottom - top, 8);
      this.scale = Math.min(MOST, Math.max(1, Math.min(clientWidth, clientHeight) / room));
      this.x = -((left + right) / 2 - image.naturalWidth / 2) * unit * this.scale;
      this.y = -((top + bottom) / 2 - image.naturalHeight / 2) * unit * this.scale;
      this.keepInside();
    },
  },
};
