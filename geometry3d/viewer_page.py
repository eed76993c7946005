"""The page of the viewer: its markup, its script, and two places for a title and the data."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>@TITLE@</title>
<style>
  html, body { margin: 0; height: 100%; overflow: hidden; background: #16181d; color: #ddd;
    font: 14px sans-serif; }
  canvas { width: 100%; height: 100%; display: block; touch-action: none; cursor: grab; }
  #panel { position: fixed; left: 12px; top: 12px; padding: 8px 12px; border-radius: 6px;
    background: #000a; }
  h1 { font-size: 15px; margin: 0 0 6px; }
  p { margin: 6px 0 0; color: #aaa; }
</style>
</head>
<body>
<canvas id="canvas"></canvas>
<div id="panel">
  <h1>@TITLE@</h1>
  <label>View from <select id="cameras"><option value="-1">outside</option></select></label>
  <label><input type="checkbox" id="frames" checked> cameras</label>
  <label>Point size <input type="range" id="size" min="1" max="8" step="0.5" value="2"></label>
  <p id="note">drag: turn &middot; shift or right button: move &middot; wheel: nearer</p>
</div>
<script type="application/json" id="data">@DATA@</script>
<script>
"use strict";
const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const floats = (text) => new Float32Array(bytes(text).buffer);
const points = floats(data.points), frames = floats(data.frames), poses = floats(data.poses);
const colours = bytes(data.colours);
const canvas = byId("canvas");
const gl = canvas.getContext("webgl", { preserveDrawingBuffer: true });
if (!gl) byId("note").textContent = "This browser has no WebGL: the cloud cannot be drawn.";

function median(values) {
  const sorted = Array.from(values).sort((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)];
}
// The middle of the cloud and how far it reaches, by medians, so that stray points do not count.
const axis = (i) => points.filter((_, k) => k % 3 === i);
const middle = [0, 1, 2].map((i) => median(axis(i)));
const reach = 2 * Math.hypot(...[0, 1, 2].map(
  (i) => median(axis(i).map((x) => Math.abs(x - middle[i]))))) || 1;

let yaw = 0.5, pitch = 0.4, distance = 2.5 * reach, target = middle.slice(), camera = -1;

function times(a, b) { // 4x4 matrices by columns
  const c = new Float32Array(16);
  for (let i = 0; i < 4; i++) for (let j = 0; j < 4; j++) for (let k = 0; k < 4; k++)
    c[4 * j + i] += a[4 * k + i] * b[4 * j + k];
  return c;
}
function projection(up, across) { // half openings' tangents; y points down in the world
  const near = 0.002 * reach, far = 200 * reach, d = far - near;
  return new Float32Array([1 / across, 0, 0, 0, 0, -1 / up, 0, 0,
    0, 0, (far + near) / d, 1, 0, 0, -2 * far * near / d, 0]);
}
function into(rows, eye) { // world to camera: the camera's axes as rows
  const shift = rows.map((r) => -(r[0] * eye[0] + r[1] * eye[1] + r[2] * eye[2]));
  const [x, y, z] = rows;
  return new Float32Array([x[0], y[0], z[0], 0, x[1], y[1], z[1], 0, x[2], y[2], z[2], 0,
    ...shift, 1]);
}
function axes() { // right, down, ahead of the eye outside
  const cy = Math.cos(yaw), sy = Math.sin(yaw), cp = Math.cos(pitch), sp = Math.sin(pitch);
  return [[cy, 0, -sy], [-sy * sp, cp, -cy * sp], [sy * cp, sp, cy * cp]];
}
function matrix() {
  const aspect = canvas.width / canvas.height;
  if (camera < 0) {
    const rows = axes(), eye = target.map((t, i) => t - distance * rows[2][i]);
    return times(projection(0.5, 0.5 * aspect), into(rows, eye));
  }
  const p = poses.subarray(16 * camera, 16 * camera + 16);
  const rows = [0, 1, 2].map((i) => [p[i], p[4 + i], p[8 + i]]);
  const up = data.openings[camera] * Math.max(1, data.aspect / aspect);
  return times(projection(up, up * aspect), into(rows, [p[3], p[7], p[11]]));
}

function shader(kind, text) {
  const made = gl.createShader(kind);
  gl.shaderSource(made, text);
  gl.compileShader(made);
  return made;
}
function buffer(values) {
  const made = gl.createBuffer();
  gl.bindBuffer(gl.ARRAY_BUFFER, made);
  gl.bufferData(gl.ARRAY_BUFFER, values, gl.STATIC_DRAW);
  return made;
}
let program, buffers;
function start() {
  program = gl.createProgram();
  gl.attachShader(program, shader(gl.VERTEX_SHADER,
    "attribute vec3 place, colour; uniform mat4 m; uniform float size; varying vec3 c;" +
    "void main() { gl_Position = m * vec4(place, 1.0); gl_PointSize = size; c = colour; }"));
  gl.attachShader(program, shader(gl.FRAGMENT_SHADER,
    "precision mediump float; varying vec3 c; void main() { gl_FragColor = vec4(c, 1.0); }"));
  gl.bindAttribLocation(program, 0, "place");
  gl.bindAttribLocation(program, 1, "colour");
  gl.linkProgram(program);
  gl.useProgram(program);
  gl.enable(gl.DEPTH_TEST);
  buffers = [buffer(points), buffer(colours), buffer(frames)];
  gl.enableVertexAttribArray(0);
}
function draw() {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = canvas.clientWidth * ratio;
  canvas.height = canvas.clientHeight * ratio;
  gl.viewport(0, 0, canvas.width, canvas.height);
  gl.clearColor(0.086, 0.094, 0.114, 1);
  gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
  gl.uniformMatrix4fv(gl.getUniformLocation(program, "m"), false, matrix());
  gl.uniform1f(gl.getUniformLocation(program, "size"), byId("size").value * ratio);
  gl.bindBuffer(gl.ARRAY_BUFFER, buffers[0]);
  gl.vertexAttribPointer(0, 3, gl.FLOAT, false, 0, 0);
  gl.bindBuffer(gl.ARRAY_BUFFER, buffers[1]);
  gl.enableVertexAttribArray(1);
  gl.vertexAttribPointer(1, 3, gl.UNSIGNED_BYTE, true, 0, 0);
  gl.drawArrays(gl.POINTS, 0, points.length / 3);
  if (camera >= 0 || !byId("frames").checked) return;
  gl.bindBuffer(gl.ARRAY_BUFFER, buffers[2]);
  gl.vertexAttribPointer(0, 3, gl.FLOAT, false, 0, 0);
  gl.disableVertexAttribArray(1);
  gl.vertexAttrib3f(1, 1, 0.75, 0.2);
  gl.drawArrays(gl.LINES, 0, frames.length / 3);
}

function outside() { camera = -1; byId("cameras").value = "-1"; }
let held = null;
canvas.addEventListener("pointerdown", (e) => {
  held = e;
  canvas.setPointerCapture(e.pointerId);
});
canvas.addEventListener("pointerup", () => { held = null; });
canvas.addEventListener("pointermove", (e) => {
  if (!held) return;
  const dx = e.clientX - held.clientX, dy = e.clientY - held.clientY;
  const moving = e.shiftKey || e.buttons === 2, rows = axes();
  const step = distance / canvas.clientHeight;
  outside();
  if (moving) target = target.map((t, i) => t - step * (dx * rows[0][i] + dy * rows[1][i]));
  else {
    yaw += 0.008 * dx;
    pitch = Math.max(-1.5, Math.min(1.5, pitch + 0.008 * dy));
  }
  held = e;
  draw();
});
canvas.addEventListener("contextmenu", (e) => e.preventDefault());
canvas.addEventListener("wheel", (e) => {
  e.preventDefault();
  outside();
  distance *= Math.exp(0.001 * e.deltaY);
  draw();
}, { passive: false });
data.names.forEach((name, i) => byId("cameras").add(new Option(name, i)));
byId("cameras").addEventListener("change", (e) => { camera = Number(e.target.value); draw(); });
if (gl) {
  start();
  for (const id of ["frames", "size"]) byId(id).addEventListener("input", draw);
  window.addEventListener("resize", draw);
  draw();
}
</script>
</body>
</html>
"""
