import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { describe, expect, test } from 'vitest';
import { CLIP_G, CLIP_L, SD3_VAE, SD35_MEDIUM_TRANSFORMER, T5_XXL } from '../../src/models/config.ts';
import { elementCount } from '../../src/tensor/data.ts';
import {
  clipTensors,
  type TensorShapes,
  t5Tensors,
  transformerTensors,
  vaeTensors,
} from '../../src/weights/expected.ts';

/** SHA-256 of the sorted lines "name AxBxC", made from the list of the released files' tensors. */
const released: Record<string, { shapes: TensorShapes; tensors: number; values: number; digest: string }> = {
  mmdit: {
    shapes: transformerTensors(SD35_MEDIUM_TRANSFORMER),
    tensors: 665,
    values: 2_469_663_936,
    digest: '3d9f2fb0941f927010a5d655a880a6b38f296599d2aca6c0ffac92c389bede40',
  },
  vae: {
    shapes: vaeTensors(SD3_VAE),
    tensors: 244,
    values: 83_819_683,
    digest: '20b923ccc73d52c2da4a0046ffda31e60394c75f67f57fec2a474c3819320fbd',
  },
  clip_l: {
    shapes: clipTensors(CLIP_L),
    tensors: 196,
    values: 123_060_480,
    digest: '0346501efc95df8012b73478f02ba6dadeeab4e129be045cf0c202bea79c5f1d',
  },
  clip_g: {
    shapes: clipTensors(CLIP_G),
    tensors: 517,
    values: 694_659_840,
    digest: 'e553816021d982ff3fddd7d01faf8ad833b7c8f2771f6784b88ea7769cf6012b',
  },
  t5xxl: {
    shapes: t5Tensors(T5_XXL),
    tensors: 219,
    values: 4_762_310_656,
    digest: 'e28a29176ec086e1b224081d33db64220c1fe38c1e71989f875fda4172bbc231',
  },
};

describe('the tensors of the released networks', () => {
  test.each(Object.entries(released))('%s', (_, { shapes, tensors, values, digest }) => {
    expect(shapes.size).toBe(tensors);
    expect([...shapes.values()].reduce((sum, shape) => sum + elementCount(shape), 0)).toBe(values);
    const lines = [...shapes].map(([name, shape]) => `${name} ${shape.join('x')}`).sort();
    expect(createHash('sha256').update(lines.join('\n')).digest('hex')).toBe(digest);
  });
});

const list = new URL('../../../shared/keys.json', import.meta.url);

// The list itself is not part of the repository; the digests above stand for it.
describe.skipIf(!existsSync(list))('the list of the released files (skipped where ../shared is absent)', async () => {
  const { official } = existsSync(list) ? JSON.parse(await readFile(list, 'utf8')) : { official: {} };
  const prefix = /^(model\.diffusion_model|first_stage_model|text_encoders\.\w+\.transformer)\./;

  test.each(Object.entries(released))('%s', (part, { shapes }) => {
    const listed: Record<string, number[]> = Object.fromEntries(
      Object.entries<number[]>(official[part]).map(([name, shape]) => [name.replace(prefix, ''), shape]),
    );
    // Listed for CLIP-L as the reference code's identity; not in the released file and not used.
    if (part === 'clip_l') delete listed['text_projection.weight'];
    expect(Object.fromEntries(shapes)).toEqual(listed);
  });
});
