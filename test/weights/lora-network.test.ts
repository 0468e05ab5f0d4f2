/** LoRAs in the real network, against the reference implementation's outputs with merged weights. */

import { readFileSync } from 'node:fs';
import { expect, it } from 'vitest';
import { bindWeights } from '../../src/models/bind.ts';
import { centreCorner, mmditx, timestepEmbedding, transformerInputs } from '../../src/models/mmditx.ts';
import type { Weights } from '../../src/models/weights.ts';
import {
  add,
  type Binding,
  type FloatTensor,
  matmul,
  parameter,
  reshape,
  type Tensor,
} from '../../src/tensor/index.ts';
import { combineLoras, type Lora, type LoraUse, openLora } from '../../src/weights/lora.ts';
import { golden, readGolden } from '../support/golden.ts';
import { goldenCheckpoint } from '../support/models.ts';
import { cpu, maxDifference } from '../support/run.ts';
import { bytesSource } from './sources.ts';

const model = (await goldenCheckpoint()).parts.transformer!;
const { config } = model;
const shapes = new Map([...model.tensors].map(([name, { shape }]) => [name, shape]));
const inputs = readGolden('mmdit');
const outputs = readGolden('lora');

async function openGolden(name: string): Promise<Lora> {
  const path = new URL(`../golden/${name}.safetensors`, import.meta.url);
  return openLora(bytesSource(readFileSync(path), `${name}.safetensors`));
}

/** The golden case B with LoRAs: the network recorded with W + up @ down for each weight they change. */
async function velocityWith(loras: readonly LoraUse[]): Promise<FloatTensor> {
  const bound = bindWeights(model);
  const changes = combineLoras(loras, 'transformer', shapes);
  const matrices = new Map<string, Binding>();
  const matrix = (name: string, values: FloatTensor): Tensor => {
    matrices.set(name, values);
    return parameter(name, 'float32', values.shape);
  };
  const weights: Weights = (name, shape) => {
    const plain = bound.weights(name, shape);
    const change = changes.get(name);
    if (!change) return plain;
    const product = matmul(matrix(`${name}.up`, change.up), matrix(`${name}.down`, change.down));
    return add(plain, reshape(product, shape));
  };
  const program = { outputs: { velocity: mmditx(config, weights, transformerInputs(config)) } };
  await bound.read();
  const executable = await cpu.compile(program, {
    files: bound.files!,
    bind: (tensor) => matrices.get(tensor.name!) ?? bound.bind(tensor),
  });
  const latent = golden(inputs, 'B.in.latent');
  const result = await executable.run({
    latent,
    timestep: timestepEmbedding(golden(inputs, 'B.in.timestep').data as Float32Array, config.timestepWidth),
    context: golden(inputs, 'B.in.context'),
    pooled: golden(inputs, 'B.in.pooled'),
    corner: centreCorner(config.tableSize, latent.shape[2]! / config.patchSize, latent.shape[3]! / config.patchSize),
  });
  await executable.dispose();
  return result.velocity as FloatTensor;
}

const kohya = await openGolden('lora_kohya');
const diffusers = await openGolden('lora_diffusers');
const expected = {
  scale1: golden(outputs, 'B.out.scale1'),
  'scale0.5': golden(outputs, 'B.out.scale0.5'),
  plain: golden(inputs, 'B.out'),
};

it.each([
  ['in kohya layout', [{ lora: kohya, strength: 1 }], 'scale1'],
  ['in diffusers layout', [{ lora: diffusers, strength: 1 }], 'scale1'],
  ['in kohya layout, at half strength', [{ lora: kohya, strength: 0.5 }], 'scale0.5'],
  ['in diffusers layout, at half strength', [{ lora: diffusers, strength: 0.5 }], 'scale0.5'],
  ['at no strength', [{ lora: kohya, strength: 0, clipStrength: 1 }], 'plain'],
  [
    'twice, at half strength each',
    [
      { lora: kohya, strength: 0.5 },
      { lora: diffusers, strength: 0.5 },
    ],
    'scale1',
  ],
  [
    'with more strength and with less than none',
    [
      { lora: diffusers, strength: 1.25 },
      { lora: kohya, strength: -0.75 },
    ],
    'scale0.5',
  ],
] as const)('a LoRA %s gives what the reference gives', async (_, loras, output) => {
  const velocity = await velocityWith(loras);
  expect(maxDifference(velocity, expected[output])).toBeLessThan(6e-6);
});

it('changes the outputs by far more than they are compared to', () => {
  expect(maxDifference(expected.scale1, expected.plain)).toBeGreaterThan(0.1);
  expect(maxDifference(expected['scale0.5'], expected.plain)).toBeGreaterThan(0.05);
});
