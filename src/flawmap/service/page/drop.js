export default {
  template: `
    <div :class="['drop', { over }]" @dragover.prevent="over = true" @dragleave="over = false" @drop.prevent="dropped">
      <label>
        <span class="drop-label">{{ busy ? busy : label }}</span>
        <input type="file" multiple :accept="accept" @change="chosen" :disabled="!!busy">
      </label>
      <p v-for="one in refused" class="told" role="alert">{{ one }}</p>
    </div>`,
  props: { address: String, label: String, accept: String },
  data: () => ({ over: false, busy: "", refused: [] }),
  methods: {
    dropped(event) {
      this.over = false;
      if (!this.busy) this.send([...event.dataTransfer.files]);
    },
    chosen(event) {
      this.send([...event.target.files]);
      event.target.value = "";
    },
    async send(files) {
      this.refused = [];
      for (const [i, file] of files.entries()) {
        this.busy = files.length === 1 ? "Sending …" : `Sending ${i + 1} of ${files.length} …`;
        try {
          const address = this.address + (this.address.includes("?") ? "&" : "?") + "name=" + encodeURIComponent(file.name);
          // A header that no form of another site can send.
          const answer = await fetch(address, { method: "POST", body: file, headers: { "X-Flawmap": "page" } });
          const told = await answer.json();
          if (answer.ok) this.$emit("sent", told);
          else this.refuse(told.detail || "It was refused.");
        } catch {
          this.refuse(`${file.name} could not be sent: the service cannot be reached.`);
        }
      }
      this.busy = "";
      this.$emit("all");
    },
    refuse(told) {
      if (this.refused.length < 5) this.refused.push(told);
    },
  },
};
