import { afterAll, describe, expect, it } from 'vitest';
import { loadClip, loadT5 } from '../../src/models/text-encoders.ts';
import { toFloat32 } from '../../src/tensor/data.ts';
import { type EncodeOptions, type Encoders, encodePrompts } from '../../src/text/conditioning.ts';
import type { EncoderTokens, PromptTokens } from '../../src/text/tokens.ts';
import { golden, readGolden } from '../support/golden.ts';
import { goldenCheckpoint } from '../support/models.ts';
import { cpu, maxDifference } from '../support/run.ts';

async function encodeOne(tokens: PromptTokens, ...rest: [Encoders, EncodeOptions?]) {
  const [one] = await encodePrompts([tokens], ...rest);
  return one!;
}

const tensors = readGolden('text');
const { parts } = await goldenCheckpoint();
const encoders = {
  clipL: loadClip(cpu, parts.clipL!),
  clipG: loadClip(cpu, parts.clipG!),
  t5: loadT5(cpu, parts.t5!),
  contextWidth: 96,
  pooledWidth: 80,
} satisfies Encoders;
afterAll(() => Promise.all([encoders.clipL, encoders.clipG, encoders.t5].map((encoder) => encoder.dispose())));

/** The golden ids of one of the four prompts, all with the same weight. */
function tokensOf(prompt: number, weight = 1): PromptTokens {
  const row = (name: string): EncoderTokens => {
    const all = Int32Array.from(golden(tensors, name).data as Int32Array);
    const length = golden(tensors, name).shape[1]!;
    const ids = all.slice(prompt * length, (prompt + 1) * length);
    return { rows: [{ ids, weights: new Float32Array(length).fill(weight) }], empty: all.slice(0, length) };
  };
  return { clipL: row('ids.clip_l'), clipG: row('ids.clip_g'), t5: row('ids.t5_77'), warnings: [] };
}

describe('conditioning', () => {
  for (const [name, prompt] of [
    ['uncond', 0],
    ['cond', 2],
  ] as const) {
    it(`agrees with the reference implementation (${name})`, async () => {
      const { context, pooled } = await encodeOne(tokensOf(prompt), encoders);
      expect(context.shape).toEqual([1, 154, 96]);
      expect(maxDifference(context, golden(tensors, `${name}.context`))).toBeLessThan(2e-5);
      expect(maxDifference(pooled, golden(tensors, `${name}.pooled`))).toBeLessThan(1e-5);
    });
  }

  it('moves weighted tokens away from the empty prompt', async () => {
    const plain = (await encodeOne(tokensOf(2), encoders)).context.data;
    const empty = (await encodeOne(tokensOf(0), encoders)).context.data;
    const weighted = (await encodeOne(tokensOf(2, 1.5), encoders)).context.data;
    const expected = plain.map((value, i) => empty[i]! + 1.5 * (value - empty[i]!));
    expect(maxDifference({ data: weighted }, { data: expected })).toBeLessThan(2e-5);
  });

  it('leaves out T5 when it is missing, or takes zeros for it', async () => {
    const without = { ...encoders, t5: undefined };
    const reference = toFloat32(golden(tensors, 'cond.context')).slice(0, 77 * 96);
    const omitted = await encodeOne(tokensOf(2), without);
    expect(omitted.context.shape).toEqual([1, 77, 96]);
    expect(maxDifference(omitted.context, { data: reference })).toBeLessThan(1e-5);
    const zeros = await encodeOne(tokensOf(2), without, { missingT5: 77 });
    expect(zeros.context.shape).toEqual([1, 154, 96]);
    expect(zeros.context.data.slice(77 * 96).every((value) => value === 0)).toBe(true);
  });

  it('keeps the columns of a missing CLIP at zero', async () => {
    const { context, pooled } = await encodeOne(tokensOf(2), { ...encoders, clipL: undefined });
    const reference = toFloat32(golden(tensors, 'cond.context'));
    for (const column of [0, 31]) expect(context.data[5 * 96 + column]).toBe(0);
    for (const column of [32, 79]) expect(context.data[5 * 96 + column]).toBeCloseTo(reference[5 * 96 + column]!, 4);
    expect([...pooled.data.slice(0, 32)]).toEqual(new Array(32).fill(0));
    expect(pooled.data[32]).toBeCloseTo(Number(golden(tensors, 'cond.pooled').data[32]), 4);
  });

  it('refuses a model without any encoder', async () => {
    const none = { contextWidth: 96, pooledWidth: 80 };
    await expect(encodeOne(tokensOf(2), none)).rejects.toThrow(/no text encoder/);
  });
});
