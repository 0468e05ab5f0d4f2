/**
 * Full-size checkpoints with random weights, in the official layout: for size, speed and memory, where no released
 * weights can be had. `npx tsx bench/full-size.ts [FOLDER]` writes 17 GB; files that are there already stay.
 */

import { existsSync } from 'node:fs';
import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { MODEL_FILE } from '../models/small/paths.ts';
import { CLIP_G, CLIP_L, SD3_VAE, SD35_MEDIUM_TRANSFORMER, T5_XXL } from '../src/models/config.ts';
import { torchGenerator } from '../src/sampling/noise.ts';
import { elementCount, toFloat16 } from '../src/tensor/data.ts';
import { writeFileAtomically } from '../src/weights/atomic.node.ts';
import { clipTensors, type TensorShapes, t5Tensors, transformerTensors, vaeTensors } from '../src/weights/expected.ts';
import { type PlannedTensors, plannedSafetensorsChunks } from '../src/weights/safetensors.ts';
import { withModel } from './models.ts';
import { ROOT } from './support.ts';

/** Where the files lie by default. */
export const FULL_SIZE_FOLDER = process.env.BENCH_FULL_SIZE ?? join(ROOT, 'bench', 'data', 'full-size');

const prefixed = (prefix: string, shapes: TensorShapes): TensorShapes =>
  new Map([...shapes].map(([name, shape]) => [`${prefix}${name}`, shape]));

/** The files of the release, by the names they have there. */
const FILES: Readonly<Record<string, TensorShapes>> = {
  'sd3.5_medium.safetensors': new Map([
    ...prefixed('model.diffusion_model.', transformerTensors(SD35_MEDIUM_TRANSFORMER)),
    ...prefixed('first_stage_model.', vaeTensors(SD3_VAE)),
  ]),
  'clip_l.safetensors': clipTensors(CLIP_L),
  'clip_g.safetensors': clipTensors(CLIP_G),
  't5xxl_fp16.safetensors': t5Tensors(T5_XXL),
};

/** Random numbers that all weights repeat, from places of their own: drawing each anew would take hours. */
const POOL = 2 ** 20;

/** Paths of the four files; writes those that are not there, and tokenizers beside them. */
export async function fullSizeFiles(folder = FULL_SIZE_FOLDER): Promise<string[]> {
  await mkdir(folder, { recursive: true });
  const paths = Object.keys(FILES).map((name) => join(folder, name));
  for (const [i, shapes] of Object.values(FILES).entries()) {
    if (existsSync(paths[i]!)) continue;
    console.error(`Writing ${paths[i]}`);
    await writeFileAtomically(paths[i]!, plannedSafetensorsChunks(planned(shapes)));
  }
  await writeTokenizers(folder);
  return paths;
}

/**
 * Tokenizers where they are looked for: those of the small model, because the released ones are not ours to ship, with
 * CLIP's marks of begin and end where the full vocabulary has them.
 */
async function writeTokenizers(folder: string): Promise<void> {
  await withModel(MODEL_FILE, async ({ parts, tokenizers }) => {
    const marks = new Map([
      [parts.clipL!.config.bosId, CLIP_L.bosId],
      [parts.clipL!.config.eosId, CLIP_L.eosId],
    ]);
    const clip = JSON.parse(tokenizers.clip!, (_key, value) =>
      typeof value === 'number' ? (marks.get(value) ?? value) : value,
    ) as unknown;
    const texts = { tokenizer: JSON.stringify(clip), tokenizer_3: tokenizers.t5! };
    for (const [name, text] of Object.entries(texts)) {
      await mkdir(join(folder, name), { recursive: true });
      await writeFileAtomically(join(folder, name, 'tokenizer.json'), [new TextEncoder().encode(text)]);
    }
  });
}

function planned(shapes: TensorShapes): PlannedTensors[] {
  const pool = torchGenerator(1).normal(POOL);
  return [...shapes].map(([name, shape], index) => ({
    tensors: new Map([[name, { dtype: 'float16', shape }]]),
    async values() {
      const scale = deviation(name, shape);
      const centre = /(?:ln_[qk]|norm\w*|layer_norm\d?)\.weight$/.test(name) ? 1 : 0;
      const halves = toFloat16(pool.map((value) => centre + scale * value));
      const data = new Uint16Array(elementCount(shape));
      // Each tensor starts elsewhere in the pool, so that no two are equal.
      for (let end = 0, start = (index * 7919) % POOL; end < data.length; start = 0) {
        const piece = halves.subarray(start, start + Math.min(POOL - start, data.length - end));
        data.set(piece, end);
        end += piece.length;
      }
      return [data];
    },
  }));
}

/**
 * Keeps activations finite: weights that keep the size of what goes through them, small vectors, and small changes to
 * the residual streams (T5 has 48 of them without a norm between; its values would leave the range of half precision).
 */
function deviation(name: string, shape: readonly number[]): number {
  if (shape.length === 1) return 0.02;
  if (/pos_embed$|(token|position)_embedding|shared\.weight|relative_attention_bias/.test(name)) return 0.5;
  const keeping = 1 / Math.sqrt(elementCount(shape.slice(1)));
  return /adaLN_modulation|\.wo\.|SelfAttention\.[qk]\./.test(name) ? keeping / 4 : keeping;
}

if (process.argv[1] && import.meta.url === pathToFileURL(process.argv[1]).href) {
  for (const path of await fullSizeFiles(process.argv[2])) console.log(path);
}
