export default {
  template: `
    <ol class="film" :aria-label="label">
      <li v-for="row in rows" :key="row.id">
        <button type="button" :class="['shot', 'is-' + row.verdict]" :data-id="row.id"
                :aria-current="row.id === chosen ? 'true' : null"
                :tabindex="row.id === (chosen ?? rows[0].id) ? 0 : -1"
                @click="$emit('choose', row.id)">
          <img v-if="row.thumb" :src="row.thumb" alt="" loading="lazy" width="56" height="56">
          <span v-else class="no-thumb" aria-hidden="true"></span>
          <span class="shot-text">
            <span class="shot-verdict"><span aria-hidden="true">{{ row.sign }}</span> {{ row.verdict }}</span>
            <span class="shot-name">{{ row.name }}</span>
            <span class="shot-at">{{ row.at }}<template v-if="row.word"> · word: {{ row.word }}</template></span>
          </span>
        </button>
      </li>
    </ol>`,
  props: { rows: Array, chosen: Number, label: String },
  watch: {
    chosen() {
      this.$nextTick(() => {
        const shot = this.$el.querySelector('[aria-current="true"]');
        if (!shot) return;
        // Not scrollIntoView, which would move the whole page too.
        const film = this.$el;
        const outer = film.getBoundingClientRect();
        const inner = shot.getBoundingClientRect();
        if (inner.top < outer.top) film.scrollTop -= outer.top - inner.top + 8;
        if (inner.bottom > outer.bottom) film.scrollTop += inner.bottom - outer.bottom + 8;
        if (inner.left < outer.left) film.scrollLeft -= outer.left - inner.left + 8;
        if (inner.right > outer.right) film.scrollLeft += inner.right - outer.right + 8;
        if (film.contains(document.activeElement)) shot.focus({ preventScroll: true });
      });
    },
  },
};
