/**
 * The VAE's decoder of full size against PyTorch in float32: seconds and memory, each in a process of its own; and how
 * far a picture of the small model that is decoded in tiles is from the one decoded at once.
 */

import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { tensorFromImage } from '../src/image/image.ts';
import { load } from '../src/index.node.ts';
import { latentOf, loadAutoencoder } from '../src/models/autoencoder.ts';
import { vaeDownscale } from '../src/models/config.ts';
import { nodeRuntime } from '../src/runtime/node.node.ts';
import { floats } from '../src/tensor/data.ts';
import { fullSizeFiles } from './full-size.ts';
import { GOLDEN, normalFloats, SMALL, withModel } from './models.ts';
import { relativeDifference } from './peer.ts';
import { publish, QUICK, ROOT, type Row, rounded, runNode, THREADS } from './support.ts';

const SIDES = QUICK ? [128] : [512, 1024];
/** Sides of the small model's picture, and of its tiles with their overlap, in pixels. */
const SEAMS = {
  side: 512,
  tiles: QUICK
    ? ([[256, 48]] as const)
    : ([
        [128, 48],
        [256, 48],
      ] as const),
};

/** What both sides' pictures may differ by, as a part of the largest value. */
const AGREEMENT = 1e-3;
/** Side of the picture that is compared. */
const COMPARED = 64;

const [, script, mode, sideText] = process.argv;
if (mode === 'decode') await decodeOnce(Number(sideText));
else await measure();

/** In a process of its own: decodes once and writes seconds and memory as JSON. */
async function decodeOnce(side: number): Promise<void> {
  const file = QUICK ? GOLDEN : (await fullSizeFiles())[0]!;
  await withModel(file, async ({ parts }) => {
    const vae = loadAutoencoder(nodeRuntime({ threads: THREADS }), parts.vae!);
    const { latentChannels } = vae.config;
    // Loading is not decoding.
    await vae.decode(normalFloats([1, latentChannels, 8, 8]));
    const before = process.resourceUsage().maxRSS * 1024;
    const latentSide = side / vaeDownscale(vae.config);
    const start = performance.now();
    await vae.decode(normalFloats([1, latentChannels, latentSide, latentSide]));
    const seconds = (performance.now() - start) / 1000;
    console.log(JSON.stringify({ seconds, before, peak: process.resourceUsage().maxRSS * 1024 }));
  });
}

interface Report {
  readonly seconds: number | readonly number[];
  readonly before: number;
  readonly peak: number;
  readonly torch?: string;
}

async function measure(): Promise<void> {
  const rows: Row[] = [];
  let torch = 'not installed';
  await checkPeer();
  for (const side of SIDES) {
    const { stdout } = await runNode([script!, 'decode', String(side)], { typescript: true });
    const ours = JSON.parse(stdout.trim().split('\n').at(-1)!) as Report & { seconds: number };
    const theirs = QUICK ? undefined : peer((await fullSizeFiles())[0]!, side);
    torch = theirs?.torch ?? torch;
    rows.push({
      what: `decode ${side} x ${side}`,
      'ours, s': rounded(ours.seconds),
      'PyTorch fp32, s': theirs ? rounded(theirs.seconds) : '',
      'ours / PyTorch': theirs ? rounded(ours.seconds / theirs.seconds) : '',
      'ours above the model, GiB': rounded((ours.peak - ours.before) / 2 ** 30),
      'PyTorch above the model, GiB': theirs ? rounded((theirs.peak - theirs.before) / 2 ** 30) : '',
      'PSNR to undivided, decoded / encoded, dB': '',
    });
  }
  if (SMALL) rows.push(...(await seams(SMALL)));
  await publish({ title: 'The VAE in tiles', rows, settings: { threads: THREADS, torch } });
}

/** The peer has to decode a latent as we do. */
async function checkPeer(): Promise<void> {
  const file = QUICK ? GOLDEN : (await fullSizeFiles())[0]!;
  const theirs = peer(file, COMPARED);
  if (!theirs) return;
  await withModel(file, async ({ parts }) => {
    const vae = loadAutoencoder(nodeRuntime({ threads: THREADS }), parts.vae!);
    const side = COMPARED / vaeDownscale(vae.config);
    const ours = await vae.decode(normalFloats([1, vae.config.latentChannels, side, side]));
    await vae.dispose();
    const difference = relativeDifference(ours, floats(ours.shape, theirs.picture));
    if (difference > AGREEMENT) throw new Error(`PyTorch's picture differs by ${difference} of its largest value.`);
  });
}

/** The second call of the PyTorch decoder; undefined where PyTorch is not installed. */
function peer(
  file: string,
  side: number,
): { seconds: number; before: number; peak: number; torch: string; picture: Float32Array } | undefined {
  const latent = normalFloats([1, 16, side / 8, side / 8]);
  const args = [join(ROOT, 'bench/peers/vae_torch.py'), file, String(THREADS), String(side / 8), String(side / 8), '1'];
  const { status, stdout } = spawnSync(process.env.PYTHON ?? 'python3', args, {
    input: new Uint8Array(latent.data.buffer),
    maxBuffer: 2 ** 30,
  });
  if (status !== 0) return undefined;
  const end = stdout.indexOf('\n');
  const report = JSON.parse(stdout.subarray(0, end).toString()) as Report & { seconds: number[]; torch: string };
  const picture = new Float32Array(Uint8Array.from(stdout.subarray(end + 1)).buffer);
  return { ...report, seconds: report.seconds.at(-1)!, picture };
}

/** Decoding a mosaic of the small model's own pictures in tiles, against decoding it at once. */
async function seams(file: string): Promise<Row[]> {
  const sd = await load(file, { device: 'cpu', threads: THREADS });
  const images = await sd.generate({ prompt: 'glossy fox on a teal background', seed: 1, batchSize: 16, steps: 12 });
  await sd.dispose();
  const { side } = SEAMS;
  const mosaic = floats([1, 3, side, side], new Float32Array(3 * side * side));
  for (const [i, image] of images.entries()) {
    const tile = tensorFromImage(image);
    const [top, left] = [Math.floor(i / 4) * image.height, (i % 4) * image.width];
    for (let channel = 0; channel < 3; channel++) {
      for (let y = 0; y < image.height; y++) {
        const from = (channel * image.height + y) * image.width;
        mosaic.data.set(tile.data.subarray(from, from + image.width), (channel * side + top + y) * side + left);
      }
    }
  }
  return withModel(file, async ({ parts }) => {
    const vae = loadAutoencoder(nodeRuntime({ threads: THREADS }), parts.vae!);
    const moments = await vae.encode(mosaic, { tile: 'off' });
    const latent = latentOf(moments, vae.config);
    const whole = await vae.decode(latent, { tile: 'off' });
    const rows: Row[] = [];
    for (const [size, overlap] of SEAMS.tiles) {
      const decoded = await vae.decode(latent, { tile: { size, overlap } });
      const encoded = latentOf(await vae.encode(mosaic, { tile: { size, overlap } }), vae.config);
      const again = await vae.decode(encoded, { tile: 'off' });
      rows.push({
        what: `small model, ${side} x ${side} in tiles of ${size}`,
        'PSNR to undivided, decoded / encoded, dB': `${rounded(psnr(decoded.data, whole.data))} / ${rounded(psnr(again.data, whole.data))}`,
      });
    }
    await vae.dispose();
    return rows;
  });
}

/** Of pictures in [-1, 1], in dB. */
function psnr(values: Float32Array, reference: Float32Array): number {
  const error = values.reduce((sum, value, i) => sum + (value - reference[i]!) ** 2, 0) / values.length;
  return 10 * Math.log10(4 / error);
}
