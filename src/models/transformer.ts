/**
 * Running the transformer. Several passes over the same latent (with the prompt, with the negative prompt, with
 * layers skipped) share one set of weights: passes of equal text length run as one batch, and a pass that skips
 * layers starts from the tokens that the complete pass had before the first skipped block.
 */

import { MmditxError } from '../errors.ts';
import type { RunOptions, Runtime } from '../runtime/runtime.ts';
import { oneAtATime } from '../runtime/turns.ts';
import type { FloatTensor } from '../tensor/index.ts';
import type { PartWeights } from '../weights/checkpoint.ts';
import { batchItems, joinBatches, repeatTo } from './batches.ts';
import { bindWeights, compileBound } from './bind.ts';
import type { TransformerConfig } from './config.ts';
import { type Lazy, lazily } from './lazily.ts';
import { centreCorner, mmditxSegment, stageCount, stageOf, timestepEmbedding } from './mmditx.ts';

/** One evaluation of the model on the latent at hand. */
export interface TransformerPass {
  /** [1 or batch, length, contextWidth] */
  readonly context: FloatTensor;
  /** [1 or batch, pooledWidth] */
  readonly pooled: FloatTensor;
  /** Indices of blocks to leave out (skip-layer guidance; Stability-AI/sd3.5, `skip_layers`). */
  readonly skipLayers?: readonly number[];
}

export interface Transformer {
  readonly config: TransformerConfig;
  /**
   * The velocity that each pass predicts for a noisy latent.
   * @param latent [batch, inChannels, height, width], sides multiples of the patch size and within the position table
   * @param timesteps 1000 * sigma of each item
   * @returns one velocity [batch, outChannels, height, width] for each pass
   */
  velocities(
    latent: FloatTensor,
    timesteps: ArrayLike<number>,
    passes: readonly TransformerPass[],
    options?: RunOptions,
  ): Promise<FloatTensor[]>;
  dispose(): Promise<void>;
}

/** Beyond this many image tokens, passes run one after the other: a batch would cost memory and gain nothing. */
const LARGEST_BATCH_TOKENS = 2048;

/** What goes into a segment and comes out of it. */
type Flow = Readonly<Record<string, FloatTensor>>;

/** Prepares a checkpoint's transformer; its weights load at the first evaluation. */
export function loadTransformer(
  runtime: Runtime,
  part: PartWeights<TransformerConfig>,
  bytes?: ReadonlyMap<string, Uint8Array>,
): Transformer {
  const { config } = part;
  const bound = bindWeights(part, bytes);
  /** Stages where the network is cut, so that the ranges between them run apart. */
  let cuts = [0, stageCount(config)];
  let segments = new Map<number, Lazy>();
  // A pass that cuts the network elsewhere must not do so under one that is running.
  const inTurn = oneAtATime();

  const segmentFrom = (start: number): Lazy => {
    const known = segments.get(start);
    if (known) return known;
    const end = cuts[cuts.indexOf(start) + 1]!;
    const segment = lazily(() => compileBound(runtime, mmditxSegment(config, bound.weights, start, end), bound));
    segments.set(start, segment);
    return segment;
  };
  const dispose = async () => {
    const loaded = [...segments.values()];
    segments = new Map();
    await Promise.all(loaded.map((segment) => segment.dispose()));
  };
  /** Cuts the network before and after every run of skipped layers. */
  const cutAround = async (layers: readonly number[]) => {
    const stages = new Set(layers.map(stageOf));
    const edges = [...stages].flatMap((stage) => [
      ...(stages.has(stage - 1) ? [] : [stage]),
      ...(stages.has(stage + 1) ? [] : [stage + 1]),
    ]);
    if (edges.every((edge) => cuts.includes(edge))) return;
    await dispose();
    cuts = [...new Set([...cuts, ...edges])].sort((a, b) => a - b);
  };

  return {
    config,
    dispose: () => inTurn(dispose),
    velocities: (latent, timesteps, passes, options) => inTurn(() => evaluate(latent, timesteps, passes, options)),
  };

  async function evaluate(
    latent: FloatTensor,
    timesteps: ArrayLike<number>,
    passes: readonly TransformerPass[],
    options: RunOptions = {},
  ): Promise<FloatTensor[]> {
    for (const { skipLayers } of passes) requireLayers(config, skipLayers ?? []);
    await cutAround([...new Set(passes.flatMap(({ skipLayers }) => skipLayers ?? []))]);
    const [batch, , height, width] = latent.shape as [number, number, number, number];
    const [rows, columns] = [height / config.patchSize, width / config.patchSize];
    const corner = centreCorner(config.tableSize, rows, columns);
    const timestep = repeatTo(timestepEmbedding(timesteps, config.timestepWidth), batch);
    const starts = cuts.slice(0, -1);

    const inputsOf = (group: readonly TransformerPass[]): Flow => ({
      latent: joinBatches(group.map(() => latent)),
      timestep: joinBatches(group.map(() => timestep)),
      context: joinBatches(group.map(({ context }) => repeatTo(context, batch))),
      pooled: joinBatches(group.map(({ pooled }) => repeatTo(pooled, batch))),
    });
    const run = async (start: number, flow: Flow): Promise<Flow> => {
      options.signal?.throwIfAborted();
      return (await (await segmentFrom(start).get()).run({ ...flow, corner }, options)) as Flow;
    };

    const results = new Map<TransformerPass, FloatTensor>();
    // The streams of complete passes before each segment, for the passes that skip layers of them.
    const streams = new Map<TransformerPass, Map<number, Flow>>();
    const complete = passes.filter(({ skipLayers }) => !skipLayers?.length);
    for (const group of batches(complete, batch * rows * columns)) {
      let flow = inputsOf(group);
      for (const pass of group) streams.set(pass, new Map());
      for (const start of starts) {
        for (const [i, pass] of group.entries()) streams.get(pass)!.set(start, itemsOf(flow, i * batch, batch));
        flow = await run(start, flow);
      }
      for (const [i, pass] of group.entries()) results.set(pass, batchItems(flow.velocity!, i * batch, batch));
    }
    for (const pass of passes) {
      const skipped = (pass.skipLayers ?? []).map(stageOf);
      if (skipped.length === 0) continue;
      const whole = complete.find(({ context, pooled }) => context === pass.context && pooled === pass.pooled);
      const from = whole ? starts.findLast((start) => start <= Math.min(...skipped))! : 0;
      let flow = whole ? streams.get(whole)!.get(from)! : inputsOf([pass]);
      for (const start of starts) {
        if (start >= from && !skipped.includes(start)) flow = await run(start, flow);
      }
      results.set(pass, flow.velocity!);
    }
    return passes.map((pass) => results.get(pass)!);
  }
}

/** Passes that can run as one batch: of equal text length, and not too many tokens together. */
function batches(passes: readonly TransformerPass[], tokens: number): TransformerPass[][] {
  const result: TransformerPass[][] = [];
  for (const pass of passes) {
    const group = result.find(
      (other) =>
        other[0]!.context.shape[1] === pass.context.shape[1] && (other.length + 1) * tokens <= LARGEST_BATCH_TOKENS,
    );
    if (group) group.push(pass);
    else result.push([pass]);
  }
  return result;
}

function itemsOf(flow: Flow, start: number, count: number): Flow {
  return Object.fromEntries(Object.entries(flow).map(([name, tensor]) => [name, batchItems(tensor, start, count)]));
}

function requireLayers({ depth }: TransformerConfig, layers: readonly number[]): void {
  const wrong = layers.find((layer) => !Number.isInteger(layer) || layer < 0 || layer >= depth);
  if (wrong !== undefined) {
    throw new MmditxError(
      'bad-option',
      `There is no layer ${wrong} to skip: this transformer has layers 0 to ${depth - 1}.`,
    );
  }
}
