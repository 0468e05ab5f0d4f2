import { writeFile } from 'node:fs/promises';
import sharp from 'sharp';
import { finishModel } from './finish.ts';
import { STAGES } from './train-transformer.ts';
import { SHEET } from './data/held-out.ts';
import { canonicalPrompt } from './data/captions.ts';
import { load } from '../../src/index.node.ts';
const stage = STAGES[Number(process.argv[2])]!, size = stage.size, n = Number(process.argv[3] ?? 16);
await finishModel(stage, '/tmp/peek.safetensors');
const sd = await load('/tmp/peek.safetensors');
const tiles: any[] = [];
for (let i = 0; i < n; i++) { const e = SHEET[Math.floor(i * 64 / n)]!; const t = Date.now(); const [im] = await sd.generate({ prompt: canonicalPrompt(e.object, e.style, e.background), width: size, height: size, steps: 20, cfg: Number(process.argv[4] ?? 3), seed: i, sampler: 'euler', scheduler: 'sgm_uniform' }); console.log(canonicalPrompt(e.object, e.style, e.background), e.heldOut, Date.now() - t);
  tiles.push({ input: Buffer.from(im!.data), raw: { width: size, height: size, channels: 3 }, left: (i % 8) * size, top: Math.floor(i / 8) * size }); }
await sharp({ create: { width: 8 * size, height: Math.ceil(n / 8) * size, channels: 3, background: '#fff' } }).composite(tiles).png().toFile('/tmp/peek0.png');
await sharp('/tmp/peek0.png').resize(1024, null, { kernel: 'nearest' }).png().toFile('/tmp/peek.png');
