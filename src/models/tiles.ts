/**
 * Doing a large picture in tiles that overlap and are blended, so that memory holds the result and one tile.
 * Nothing here knows what is done to a tile.
 */

import { elementCount, type FloatTensor, floats } from '../tensor/data.ts';

export interface TileSize {
  /** Longest side of a tile. */
  readonly size: number;
  /** What two neighbours share at least; below `size`. */
  readonly overlap: number;
}

/** A stretch of one axis, `end` not included. */
export interface Span {
  readonly start: number;
  readonly end: number;
}

export interface TilesOptions {
  /** In units. */
  readonly tile: TileSize;
  /** Elements of the input to a unit, whose multiples tiles begin and end at (default 1). */
  readonly unit?: number | undefined;
  /** Stops the work between two tiles. */
  readonly signal?: AbortSignal | undefined;
}

/**
 * Covers an axis with as few tiles as do, all of one length and evenly spaced. They are no longer than they have to be.
 * @throws RangeError when the tile is not longer than the overlap
 */
export function tileSpans(size: number, { size: tile, overlap }: TileSize): Span[] {
  if (!(overlap >= 0 && tile > overlap)) throw new RangeError(`Tiles of ${tile} cannot overlap by ${overlap}.`);
  if (size <= tile) return [{ start: 0, end: size }];
  const count = Math.ceil((size - overlap) / (tile - overlap));
  const length = Math.ceil((size + (count - 1) * overlap) / count);
  return Array.from({ length: count }, (_, i) => {
    // Rounded down, a step is no longer than the length less the overlap: that is what `length` is rounded up for.
    const start = Math.floor((i * (size - length)) / (count - 1));
    return { start, end: start + length };
  });
}

/**
 * Share of the overlap at each tile's edge that counts for nothing, as the edge itself, where the network sees zeros
 * instead of the picture, changes it most. The neighbours fade into each other in the middle.
 */
const EDGE_SHARE = 3 / 8;

/** The weight of each tile at each of its positions; the sum over tiles is 1. */
export function blendWeights(spans: readonly Span[]): Float64Array[] {
  const weights = spans.map(({ start, end }, i) => {
    const before = i > 0 ? spans[i - 1]!.end - start : 0;
    const after = i < spans.length - 1 ? end - spans[i + 1]!.start : 0;
    return Float64Array.from(
      { length: end - start },
      (_, x) => fade(x + 0.5, before) * fade(end - start - x - 0.5, after),
    );
  });
  const sums = new Float64Array(spans.at(-1)!.end);
  for (const [i, { start }] of spans.entries())
    for (const [x, weight] of weights[i]!.entries()) sums[start + x]! += weight;
  return weights.map((tile, i) => tile.map((weight, x) => weight / sums[spans[i]!.start + x]!));
}

/** From 0 to 1 over the middle of an overlap. */
function fade(position: number, overlap: number): number {
  const edge = EDGE_SHARE * overlap;
  return position >= overlap ? 1 : Math.min(Math.max((position - edge) / (overlap - 2 * edge), 0), 1);
}

/**
 * Runs work that maps images to images on one tile after the other.
 * @param input [batch, channels, height, width], sides multiples of the unit
 * @param work gives [batch, any channels, height * scale, width * scale], the same scale for every tile; a unit times
 *   the scale is a whole number
 * @returns the same for the whole input
 */
export async function inTiles(
  input: FloatTensor,
  options: TilesOptions,
  work: (tile: FloatTensor) => Promise<FloatTensor>,
): Promise<FloatTensor> {
  let output: FloatTensor | undefined;
  let [down, across]: [Fading[], Fading[]] = [[], []];
  for (const { row, column, rows, columns, tile } of tilesOf(input, options)) {
    const result = await work(tile);
    if (!output) {
      const [batch, channels, tileHeight] = result.shape as [number, number, number];
      const scale = tileHeight / (rows[0]!.end - rows[0]!.start);
      [down, across] = [fadings(rows, scale), fadings(columns, scale)];
      const shape = [batch, channels, down.at(-1)!.span.end, across.at(-1)!.span.end];
      output = floats(shape, new Float32Array(elementCount(shape)));
    }
    blend(output, result, down[row]!, across[column]!);
  }
  return output!;
}

interface Tile {
  readonly tile: FloatTensor;
  /** The places of all tiles along each axis, in elements, and which of them this one has. */
  readonly rows: readonly Span[];
  readonly columns: readonly Span[];
  readonly row: number;
  readonly column: number;
}

/** Cuts the tiles out one after the other, row by row. */
export function* tilesOf(input: FloatTensor, { tile, unit = 1, signal }: TilesOptions): Generator<Tile> {
  const [rows, columns] = input.shape
    .slice(2)
    .map((size) => tileSpans(size / unit, tile).map((span) => scaled(span, unit))) as [Span[], Span[]];
  for (let row = 0; row < rows.length; row++) {
    for (let column = 0; column < columns.length; column++) {
      signal?.throwIfAborted();
      yield { tile: crop(input, rows[row]!, columns[column]!), rows, columns, row, column };
    }
  }
}

/** How a tile fades in over what is there already, along one axis. */
interface Fading {
  readonly span: Span;
  readonly weights: Float64Array;
  /** Sums of the weights of the tiles before it. */
  readonly earlier: Float64Array;
}

function fadings(places: readonly Span[], scale: number): Fading[] {
  const spans = places.map((span) => scaled(span, scale));
  const sums = new Float64Array(spans.at(-1)!.end);
  const weights = blendWeights(spans);
  return spans.map((span, i) => {
    const earlier = sums.slice(span.start, span.end);
    for (const [x, weight] of weights[i]!.entries()) sums[span.start + x]! += weight;
    return { span, weights: weights[i]!, earlier };
  });
}

/** Moves the output towards a tile by the tile's part of the weight so far: where the two agree, nothing changes. */
function blend(output: FloatTensor, tile: FloatTensor, down: Fading, across: Fading): void {
  const [batch, channels, outHeight, outWidth] = output.shape as [number, number, number, number];
  const [height, width] = tile.shape.slice(2) as [number, number];
  const shares = new Float64Array(height * width);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const weight = down.weights[y]! * across.weights[x]!;
      // Rows of tiles before this one are complete.
      const earlier = down.earlier[y]! + down.weights[y]! * across.earlier[x]!;
      shares[y * width + x] = weight > 0 ? weight / (earlier + weight) : 0;
    }
  }
  for (let image = 0; image < batch * channels; image++) {
    for (let y = 0; y < height; y++) {
      const from = (image * height + y) * width;
      const to = (image * outHeight + down.span.start + y) * outWidth + across.span.start;
      for (let x = 0; x < width; x++) {
        const old = output.data[to + x]!;
        output.data[to + x] = old + (tile.data[from + x]! - old) * shares[y * width + x]!;
      }
    }
  }
}

function scaled({ start, end }: Span, scale: number): Span {
  return { start: start * scale, end: end * scale };
}

function crop(input: FloatTensor, rows: Span, columns: Span): FloatTensor {
  const indices = ({ start, end }: Span) => Array.from({ length: end - start }, (_, i) => start + i);
  return pick(input, indices(rows), indices(columns));
}

/**
 * A small image made of rows and columns from all over a large one, in pairs of neighbours that begin in even places:
 * what a network makes of an image hangs on how neighbours differ.
 * @param share of the pairs of rows, and of the pairs of columns; rounded down, though not to none
 */
export function evenSample(input: FloatTensor, share: number): FloatTensor {
  const kept = (size: number) => {
    const pairs = Math.max(Math.floor(size / 2), 1);
    const count = Math.max(Math.floor(pairs * share), 1);
    return Array.from({ length: count }, (_, i) => 2 * Math.floor(((i + 0.5) * pairs) / count)).flatMap((first) => [
      first,
      Math.min(first + 1, size - 1),
    ]);
  };
  const [height, width] = input.shape.slice(2) as [number, number];
  return pick(input, kept(height), kept(width));
}

function pick(input: FloatTensor, rows: readonly number[], columns: readonly number[]): FloatTensor {
  const [batch, channels, height, width] = input.shape as [number, number, number, number];
  const data = new Float32Array(batch * channels * rows.length * columns.length);
  let next = 0;
  for (let image = 0; image < batch * channels; image++) {
    for (const row of rows) {
      const start = (image * height + row) * width;
      for (const column of columns) data[next++] = input.data[start + column]!;
    }
  }
  return floats([batch, channels, rows.length, columns.length], data);
}
