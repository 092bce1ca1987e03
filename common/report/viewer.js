"use strict";
// Draws crystals on canvases: depth-sorted balls, sticks and faces, turned by mouse, touch or keys.
(() => {
  const scenes = JSON.parse(document.getElementById("scenes").textContent);
  const TILT = [0.32, -0.38];
  const sprites = new Map();
  let printing = false;
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const cross = (u, v) => [u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]];
  const dot = (u, v) => u[0] * v[0] + u[1] * v[1] + u[2] * v[2];
  const norm = (u) => { const n = Math.hypot(...u) || 1; return u.map((x) => x / n); };
  const multiply = (m, n) => m.map((row) => [0, 1, 2].map((j) => row[0] * n[0][j] + row[1] * n[1][j] + row[2] * n[2][j]));
  const turnX = (t) => [[1, 0, 0], [0, Math.cos(t), -Math.sin(t)], [0, Math.sin(t), Math.cos(t)]];
  const turnY = (t) => [[Math.cos(t), 0, Math.sin(t)], [0, 1, 0], [-Math.sin(t), 0, Math.cos(t)]];
  const apply = (m, p) => m.map((row) => dot(row, p));

  // Rows: right, up, towards the viewer. Looks along one lattice vector with another one upwards.
  function along(cell, axis) {
    const toward = norm(cell[axis]);
    const upward = cell[axis === 2 ? 1 : 2];
    const up = norm(upward.map((x, i) => x - dot(upward, toward) * toward[i]));
    return [cross(up, toward), up, toward];
  }

  function standard(cell) {
    return multiply(multiply(turnX(TILT[0]), turnY(TILT[1])), along(cell, 0));
  }

  function rgb(hex) { return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)); }
  function mix(color, target, amount) {
    return "rgb(" + rgb(color).map((x, i) => Math.round(x + (target[i] - x) * amount)).join(",") + ")";
  }

  // A shaded ball, drawn once per colour and copied at any size.
  function sprite(color) {
    if (sprites.has(color)) return sprites.get(color);
    const size = 160, half = size / 2, canvas = document.createElement("canvas");
    canvas.width = canvas.height = size;
    const g = canvas.getContext("2d");
    const shade = g.createRadialGradient(half * 0.68, half * 0.62, half * 0.06, half, half, half * 0.97);
    shade.addColorStop(0, mix(color, [255, 255, 255], 0.85));
    shade.addColorStop(0.25, mix(color, [255, 255, 255], 0.28));
    shade.addColorStop(0.65, color);
    shade.addColorStop(1, mix(color, [0, 0, 0], 0.5));
    g.fillStyle = shade;
    g.beginPath(); g.arc(half, half, half * 0.97, 0, 7); g.fill();
    g.strokeStyle = mix(color, [0, 0, 0], 0.65); g.lineWidth = size / 60; g.stroke();
    sprites.set(color, canvas);
    return canvas;
  }

  class Viewer {
    constructor(canvas) {
      this.canvas = canvas;
      this.scene = scenes[Number(canvas.dataset.scene)];
      this.show = { bonds: true, faces: this.scene.faces.length > 0 };
      const toggle = canvas.parentElement.querySelector('[data-do="faces"]');
      toggle.hidden = !this.show.faces;
      this.visible = false;
      this.legend();
      this.measure();
      this.reset();
      this.listen();
    }

    legend() {
      const box = this.canvas.parentElement.querySelector(".legend");
      for (const element of this.scene.elements) {
        const item = document.createElement("span"), dot = document.createElement("i");
        dot.style.background = element.color;
        item.append(dot, element.symbol);
        box.append(item);
      }
    }

    measure() {
      const { cell, atoms } = this.scene;
      this.center = [0, 1, 2].map((i) => (cell[0][i] + cell[1][i] + cell[2][i]) / 2);
      this.corners = [];
      for (let i = 0; i < 8; i++) {
        this.corners.push([0, 1, 2].map((k) => (i & 1) * cell[0][k] + ((i >> 1) & 1) * cell[1][k] + (i >> 2) * cell[2][k]));
      }
      const points = this.corners.concat(atoms.map((a) => a.slice(1)));
      this.reach = Math.max(...points.map((p) => Math.hypot(...p.map((x, i) => x - this.center[i])))) + 0.7;
    }

    reset() { this.view = standard(this.scene.cell); this.zoom = 1; this.draw(); }

    listen() {
      const canvas = this.canvas;
      let last = null, pinch = 0;
      const pointers = new Map();
      canvas.addEventListener("pointerdown", (e) => { canvas.setPointerCapture(e.pointerId); pointers.set(e.pointerId, e); last = e; pinch = 0; });
      canvas.addEventListener("pointermove", (e) => {
        if (!pointers.has(e.pointerId)) return;
        pointers.set(e.pointerId, e);
        if (pointers.size === 2) {
          const [p, q] = [...pointers.values()], gap = Math.hypot(p.clientX - q.clientX, p.clientY - q.clientY);
          if (pinch) this.scale(gap / pinch);
          pinch = gap;
        } else if (last) {
          this.turn((e.clientX - last.clientX) * 0.01, (e.clientY - last.clientY) * 0.01);
          last = e;
        }
      });
      const release = (e) => { pointers.delete(e.pointerId); last = null; pinch = 0; };
      canvas.addEventListener("pointerup", release);
      canvas.addEventListener("pointercancel", release);
      canvas.addEventListener("wheel", (e) => { e.preventDefault(); this.scale(Math.exp(-e.deltaY * 0.0012)); }, { passive: false });
      canvas.addEventListener("dblclick", () => this.reset());
      canvas.addEventListener("keydown", (e) => {
        const moves = { ArrowLeft: [-0.12, 0], ArrowRight: [0.12, 0], ArrowUp: [0, -0.12], ArrowDown: [0, 0.12] };
        if (moves[e.key]) this.turn(...moves[e.key]);
        else if (e.key === "+" || e.key === "=") this.scale(1.12);
        else if (e.key === "-") this.scale(1 / 1.12);
        else return;
        e.preventDefault();
      });
      canvas.parentElement.querySelector(".tools").addEventListener("click", (e) => this.tool(e.target.closest("button")));
      new ResizeObserver(() => this.draw()).observe(canvas);
      // Long pages hold many drawings: only those near the window keep their pixels.
      new IntersectionObserver((entries) => {
        this.visible = entries[entries.length - 1].isIntersecting;
        if (this.visible) this.draw(); else this.release();
      }, { rootMargin: "800px" }).observe(canvas);
    }

    tool(button) {
      if (!button) return;
      const what = button.dataset.do;
      if (what in this.show) {
        this.show[what] = !this.show[what];
        button.setAttribute("aria-pressed", String(this.show[what]));
        this.draw();
      } else if (what === "reset") this.reset();
      else { this.view = along(this.scene.cell, "abc".indexOf(what)); this.draw(); }
    }

    turn(dx, dy) { this.view = multiply(multiply(turnX(dy), turnY(dx)), this.view); this.draw(); }
    scale(factor) { this.zoom = Math.min(8, Math.max(0.3, this.zoom * factor)); this.draw(); }

    release() { if (!this.visible && !printing) this.canvas.width = this.canvas.height = 1; }

    draw() {
      if (!this.visible && !printing) return;
      const ratio = Math.max(2, window.devicePixelRatio || 1);
      const width = this.canvas.clientWidth, height = this.canvas.clientHeight;
      if (!width) return;
      this.canvas.width = width * ratio; this.canvas.height = height * ratio;
      const g = this.canvas.getContext("2d");
      g.setTransform(ratio, 0, 0, ratio, 0, 0);
      g.clearRect(0, 0, width, height);
      const unit = this.zoom * Math.min(width, height * 1.1) / (2.2 * this.reach), far = this.reach * 7;
      const place = (p) => {
        const q = apply(this.view, p.map((x, i) => x - this.center[i])), s = far / (far - q[2]);
        return [width / 2 + q[0] * unit * s, height / 2 - q[1] * unit * s, q[2], unit * s];
      };
      const { atoms, bonds, faces, elements } = this.scene;
      const points = atoms.map((a) => place(a.slice(1)));
      const items = atoms.map((a, i) => ({ depth: points[i][2], paint: () => this.ball(g, points[i], elements[a[0]]) }));
      this.edges(place, items, g);
      if (this.show.bonds) for (const [i, j] of bonds) this.stick(g, atoms, elements, place, i, j, items);
      if (this.show.faces) for (const face of faces) this.face(g, face, points, elements, items);
      items.sort((p, q) => p.depth - q.depth);
      for (const item of items) item.paint();
      this.axes(g, height);
    }

    radius(element) { return 0.17 + 0.21 * element.radius; }

    ball(g, [x, y, depth, unit], element) {
      const r = this.radius(element) * unit;
      g.drawImage(sprite(element.color), x - r, y - r, 2 * r, 2 * r);
      const fog = 0.4 * Math.max(0, Math.min(1, (0.25 * this.reach - depth) / (1.6 * this.reach)));
      if (fog > 0.02) {
        g.save(); g.globalAlpha = fog; g.fillStyle = css("--view");
        g.beginPath(); g.arc(x, y, r, 0, 7); g.fill(); g.restore();
      }
    }

    stick(g, atoms, elements, place, i, j, items) {
      const p = atoms[i].slice(1), q = atoms[j].slice(1), length = Math.hypot(...p.map((x, k) => q[k] - x));
      const [ri, rj] = [this.radius(elements[atoms[i][0]]), this.radius(elements[atoms[j][0]])];
      const at = (t) => p.map((x, k) => x + (q[k] - x) * t);
      const stops = [0.8 * ri / length, 0.5, 1 - 0.8 * rj / length];
      for (const half of [0, 1]) {
        const a = place(at(stops[half])), b = place(at(stops[half + 1]));
        const color = elements[atoms[half ? j : i][0]].color;
        items.push({ depth: (a[2] + b[2]) / 2, paint: () => {
          g.lineCap = "butt";
          for (const [w, tone] of [[0.2, mix(color, [0, 0, 0], 0.45)], [0.15, color], [0.05, mix(color, [255, 255, 255], 0.45)]]) {
            g.strokeStyle = tone; g.lineWidth = w * a[3];
            g.beginPath(); g.moveTo(a[0], a[1]); g.lineTo(b[0], b[1]); g.stroke();
          }
        } });
      }
    }

    face(g, [element, i, j, k], points, elements, items) {
      const [a, b, c] = [points[i], points[j], points[k]];
      const facing = Math.abs((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]));
      const tone = mix(elements[element].color, [255, 255, 255], Math.min(0.5, facing / (a[3] * a[3] * 12)));
      items.push({ depth: (a[2] + b[2] + c[2]) / 3, paint: () => {
        g.save(); g.globalAlpha = 0.36; g.fillStyle = tone;
        g.beginPath(); g.moveTo(a[0], a[1]); g.lineTo(b[0], b[1]); g.lineTo(c[0], c[1]); g.closePath(); g.fill();
        g.globalAlpha = 0.6; g.strokeStyle = mix(elements[element].color, [0, 0, 0], 0.3); g.lineWidth = 0.8; g.lineJoin = "round"; g.stroke();
        g.restore();
      } });
    }

    // Cell edges in short pieces, so that balls in front of and behind them sort correctly.
    edges(place, items, g) {
      const color = css("--cell");
      for (let i = 0; i < 8; i++) for (const bit of [1, 2, 4]) {
        if (i & bit) continue;
        const p = this.corners[i], q = this.corners[i | bit];
        for (let n = 0; n < 10; n++) {
          const a = place(p.map((x, k) => x + (q[k] - x) * n / 10)), b = place(p.map((x, k) => x + (q[k] - x) * (n + 1) / 10));
          items.push({ depth: (a[2] + b[2]) / 2, paint: () => {
            g.strokeStyle = color; g.lineWidth = 1.1; g.lineCap = "round";
            g.beginPath(); g.moveTo(a[0], a[1]); g.lineTo(b[0], b[1]); g.stroke();
          } });
        }
      }
    }

    axes(g, height) {
      const origin = [38, height - 38], colors = ["#d0453a", "#2f9e52", "#3b6fd4"];
      g.font = "italic 600 13px Georgia, serif"; g.textAlign = "center"; g.textBaseline = "middle";
      this.scene.cell.map((v, i) => [apply(this.view, norm(v)), i]).sort((p, q) => p[0][2] - q[0][2]).forEach(([v, i]) => {
        const tip = [origin[0] + 24 * v[0], origin[1] - 24 * v[1]];
        g.strokeStyle = g.fillStyle = colors[i]; g.lineWidth = 2.2; g.lineCap = "round";
        g.beginPath(); g.moveTo(...origin); g.lineTo(...tip); g.stroke();
        g.fillText("abc"[i], origin[0] + 33 * v[0], origin[1] - 33 * v[1]);
      });
    }
  }

  const viewers = [...document.querySelectorAll("canvas[data-scene]")].map((canvas) => new Viewer(canvas));
  const redraw = () => viewers.forEach((viewer) => viewer.draw());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("beforeprint", () => { printing = true; redraw(); });
  addEventListener("afterprint", () => { printing = false; redraw(); viewers.forEach((viewer) => viewer.release()); });
})();
