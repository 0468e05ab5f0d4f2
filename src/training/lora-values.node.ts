/** The trained matrices of a LoRA as values of parameters, to go on from a file and to write one. */

import { MmditxError } from '../errors.ts';
import type { TransformerConfig } from '../models/config.ts';
import { floats } from '../tensor/data.ts';
import { fileSource, writeSafetensorsFile } from '../weights/files.node.ts';
import { type LowRank, openLora } from '../weights/lora.ts';
import type { LoraPart } from '../weights/lora-names.ts';
import { loraFile } from '../weights/lora-write.ts';
import { quote } from '../weights/quote.ts';
import type { LoraConfig } from './config.ts';
import type { Parameters } from './gradients.ts';
import { type AdaptedLayer, loraScale } from './parts.ts';

/**
 * Values from a LoRA file, in any of the layouts that `openLora` reads; layers that it does not change stay as they are.
 * @throws MmditxError `bad-option` where its ranks are not those of the configuration, or it changes nothing that is trained
 */
export async function loadLoraValues(
  path: string,
  layers: readonly AdaptedLayer[],
  config: LoraConfig,
  values: Parameters,
): Promise<void> {
  const source = await fileSource(path);
  try {
    const { parts } = await openLora(source);
    let found = 0;
    for (const { part, weight, down, up } of layers) {
      const changes = parts[part as LoraPart]?.get(weight);
      if (!changes) continue;
      const joined = joinedChange(changes);
      const rank = joined?.down.shape[0];
      if (!joined || rank !== config.rank) {
        throw new MmditxError(
          'bad-option',
          `${path} has ${joined ? `rank ${rank}` : 'several products of different matrices'} at ${quote(weight)}; ` +
            `set lora.rank to its rank, or resize the file to ${config.rank} with mmditx lora resize.`,
        );
      }
      values.get(down)!.data.set(joined.down.data);
      const scale = joined.scale / loraScale(config);
      values.get(up)!.data.set(joined.up.map((value) => value * scale));
      found++;
    }
    if (found === 0) {
      throw new MmditxError('bad-option', `${path} changes none of the layers of this run; check lora.targets.`);
    }
  } finally {
    await source.close();
  }
}

/** One change of a weight from those of its rows, where all have the same `down`. */
function joinedChange(
  changes: readonly LowRank[],
): { down: LowRank['down']; up: Float32Array; scale: number } | undefined {
  const [first, ...rest] = [...changes].sort((a, b) => a.rows[0] - b.rows[0]) as [LowRank, ...LowRank[]];
  const rank = first.down.shape[0]!;
  const up = new Float32Array(first.outputs * rank);
  for (const change of [first, ...rest]) {
    const same = change.down.data.length === first.down.data.length && change.scale === first.scale;
    if (!same || change.down.data.some((value, i) => value !== first.down.data[i])) return undefined;
    up.set(change.up.data, change.rows[0] * rank);
  }
  return { down: first.down, up, scale: first.scale };
}

export interface WriteLoraOptions {
  readonly config: LoraConfig;
  readonly transformer: TransformerConfig;
  readonly metadata: Readonly<Record<string, string>>;
}

/** Writes a LoRA that ComfyUI, kohya's scripts and diffusers read, in half precision. */
export async function writeLora(
  path: string,
  layers: readonly AdaptedLayer[],
  values: Parameters,
  { config, transformer, metadata }: WriteLoraOptions,
): Promise<void> {
  const { rank, alpha = rank, format } = config;
  const file = loraFile(
    layers.map(({ part, weight, down, up }) => ({
      part: part as LoraPart,
      weight,
      down: floats(values.get(down)!.shape, values.get(down)!.data),
      up: floats(values.get(up)!.shape, values.get(up)!.data),
      alpha,
    })),
    { format, transformer, metadata, dtype: 'float16' },
  );
  await writeSafetensorsFile(path, file.tensors, file.metadata);
}
