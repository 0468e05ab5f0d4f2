/**
 * Is the nearest training picture of the object that was asked for?
 *
 * A generated picture is compared with every picture that training saw, each laid on the background that the prompt
 * names, in the feature space below; objects are then ranked by their nearest picture. Held-out pictures
 * (`held-out.ts`) are not among them: a held-out pair is found by its object's pictures in the other styles.
 *
 * The feature of a picture, from its area-averaged 32 x 32 version in CIE L*a*b* (D65), made of three blocks:
 * - *colour*: the colour less the background's (the median of the outermost pixels), averaged over 8 x 8 fields with
 *   overlapping triangular windows, so that a shift by a pixel or two changes little;
 * - *outline*: how far each pixel is from the background, 1 - exp(-(dE / 15)^2), over the same fields: the shape
 *   whatever its colours;
 * - *edges*: a histogram of gradient directions as in HOG (Dalal and Triggs, "Histograms of oriented gradients for human
 *   detection", 2005): 8 unsigned directions over 6 x 6 fields, each pixel counted with the gradient of whichever of
 *   L*, a*, b* is steepest, square-rooted and of unit length.
 * A block's squared distances are divided by their mean over pairs of library pictures, then added with `BLOCK_WEIGHTS`.
 * The picture asked about is also tried shifted by two of the 32 pixels in eight directions, and the least distance
 * counts.
 *
 * How far the measure can be trusted, on the real pictures at 64 px over 242 objects (chance: 0.4 % first, 2.1 % among
 * the first five):
 * - the 64 pictures of the sheet, as they ought to be: all first, the sixteen that are held out included;
 * - any picture of the sets, blurred (sigma 2 px), shifted (6 px), or with the wrong shade behind it: first in 100 %;
 *   blurred, shifted and noisy (1.5 px, 4 px, sigma 0.15): first in 90 %, among five in 98 %;
 * - blurred past recognition (sigma 8 px): 31 % and 57 %, so the number alone doesn't prove a sharp picture;
 * - a style's pictures against the other three styles only: 3d, gradient and flat first in 99 to 100 %; Noto, often
 *   drawn from another side or in other colours, 69 %, among five in 81 %;
 * - noise, plain grounds, discs, averages of four pictures and pictures of other objects: chance.
 */
import type { Background } from './captions.ts';
import { type Pair, trainingPairs } from './held-out.ts';
import { compose, type PictureSet, pictureAt } from './pictures.ts';

/** Side of the picture that features are taken from. */
const SIDE = 32;
const COLOUR_FIELDS = 8;
const EDGE_FIELDS = 6;
const DIRECTIONS = 8;
/** Colour difference (CIE 1976) by which a pixel stands out from the background. */
const OUTLINE_DIFFERENCE = 15;
/** Shifts tried, in pixels of the 32 x 32 picture. */
const SHIFTS = [-2, 0, 2];

const BLOCKS = ['colour', 'outline', 'edges'] as const;
type Block = (typeof BLOCKS)[number];
export type Feature = Readonly<Record<Block, Float32Array>>;

/** Of a handful tried, those with which Noto's pictures find their object best among the other styles'. */
export const BLOCK_WEIGHTS: Readonly<Record<Block, number>> = { colour: 1, outline: 0.5, edges: 2 };

/** [3, height, width] to [3, SIDE, SIDE]: each output pixel is the mean of the area it covers. */
function areaAverage(image: Float32Array, height: number, width: number): Float32Array {
  const rows = new Float32Array(3 * SIDE * width);
  averageAlong(image, rows, 3, height, SIDE, width);
  const out = new Float32Array(3 * SIDE * SIDE);
  averageAlong(rows, out, 3 * SIDE, width, SIDE, 1);
  return out;
}

/** [outer, from, inner] to [outer, to, inner]. */
function averageAlong(
  input: Float32Array,
  output: Float32Array,
  outer: number,
  from: number,
  to: number,
  inner: number,
): void {
  const ratio = from / to;
  for (let target = 0; target < to; target++) {
    const start = target * ratio;
    const end = start + ratio;
    for (let source = Math.floor(start); source < Math.min(from, Math.ceil(end)); source++) {
      const weight = (Math.min(end, source + 1) - Math.max(start, source)) / ratio;
      for (let o = 0; o < outer; o++) {
        for (let i = 0; i < inner; i++) {
          const at = (o * to + target) * inner + i;
          output[at] = output[at]! + weight * input[(o * from + source) * inner + i]!;
        }
      }
    }
  }
}

/** sRGB to linear light, IEC 61966-2-1, from [-1, 1]. */
function linearLight(value: number): number {
  const unit = Math.min(1, Math.max(0, (value + 1) / 2));
  return unit <= 0.04045 ? unit / 12.92 : ((unit + 0.055) / 1.055) ** 2.4;
}

/** The cube root of CIE L*a*b* with its straight piece near black. */
const labRoot = (t: number): number => (t > 216 / 24389 ? Math.cbrt(t) : (t * (24389 / 27) + 16) / 116);

/** [3, pixels] sRGB in [-1, 1] to L*a*b*, white point D65. */
function toLab(image: Float32Array): Float32Array {
  const pixels = image.length / 3;
  const lab = new Float32Array(image.length);
  for (let p = 0; p < pixels; p++) {
    const r = linearLight(image[p]!);
    const g = linearLight(image[pixels + p]!);
    const b = linearLight(image[2 * pixels + p]!);
    const x = labRoot((0.4124564 * r + 0.3575761 * g + 0.1804375 * b) / 0.95047);
    const y = labRoot(0.2126729 * r + 0.7151522 * g + 0.072175 * b);
    const z = labRoot((0.0193339 * r + 0.119192 * g + 0.9503041 * b) / 1.08883);
    lab[p] = 116 * y - 16;
    lab[pixels + p] = 500 * (x - y);
    lab[2 * pixels + p] = 200 * (y - z);
  }
  return lab;
}

/** The median of each channel over the outermost pixels of [3, SIDE, SIDE]. */
function borderColour(lab: Float32Array): number[] {
  return [0, 1, 2].map((channel) => {
    const values: number[] = [];
    for (let y = 0; y < SIDE; y++) {
      for (let x = 0; x < SIDE; x++) {
        if (y === 0 || x === 0 || y === SIDE - 1 || x === SIDE - 1) values.push(lab[(channel * SIDE + y) * SIDE + x]!);
      }
    }
    return values.sort((a, b) => a - b)[values.length >> 1]!;
  });
}

/** Triangular windows, each as wide as two fields: [fields, SIDE], every pixel's weights adding up to one. */
function fieldWindows(fields: number): Float32Array {
  const windows = new Float32Array(fields * SIDE);
  for (let pixel = 0; pixel < SIDE; pixel++) {
    const place = Math.min(fields - 1, Math.max(0, ((pixel + 0.5) * fields) / SIDE - 0.5));
    const below = Math.min(fields - 2, Math.floor(place));
    windows[below * SIDE + pixel] = 1 - (place - below);
    windows[(below + 1) * SIDE + pixel] = place - below;
  }
  return windows;
}
const COLOUR_WINDOWS = fieldWindows(COLOUR_FIELDS);
const EDGE_WINDOWS = fieldWindows(EDGE_FIELDS);

/** Sums [planes, SIDE, SIDE] over windows: [planes, fields, fields]. */
function poolFields(planes: Float32Array, windows: Float32Array): Float32Array {
  const fields = windows.length / SIDE;
  const count = planes.length / (SIDE * SIDE);
  const across = new Float32Array(count * SIDE * fields);
  for (let row = 0; row < count * SIDE; row++) {
    for (let field = 0; field < fields; field++) {
      let sum = 0;
      for (let x = 0; x < SIDE; x++) sum += windows[field * SIDE + x]! * planes[row * SIDE + x]!;
      across[row * fields + field] = sum;
    }
  }
  const out = new Float32Array(count * fields * fields);
  for (let plane = 0; plane < count; plane++) {
    for (let fieldY = 0; fieldY < fields; fieldY++) {
      for (let y = 0; y < SIDE; y++) {
        const weight = windows[fieldY * SIDE + y]!;
        if (weight === 0) continue;
        for (let fieldX = 0; fieldX < fields; fieldX++) {
          const at = (plane * fields + fieldY) * fields + fieldX;
          out[at] = out[at]! + weight * across[(plane * SIDE + y) * fields + fieldX]!;
        }
      }
    }
  }
  return out;
}

/** [DIRECTIONS, SIDE, SIDE]: each pixel's steepest gradient, shared between the two nearest directions. */
function directionPlanes(lab: Float32Array): Float32Array {
  const planes = new Float32Array(DIRECTIONS * SIDE * SIDE);
  for (let y = 0; y < SIDE; y++) {
    for (let x = 0; x < SIDE; x++) {
      let steepest = 0;
      let direction = 0;
      for (let channel = 0; channel < 3; channel++) {
        const at = (row: number, column: number) => lab[(channel * SIDE + row) * SIDE + column]!;
        const dx = at(y, Math.min(SIDE - 1, x + 1)) - at(y, Math.max(0, x - 1));
        const dy = at(Math.min(SIDE - 1, y + 1), x) - at(Math.max(0, y - 1), x);
        const length = Math.hypot(dx, dy);
        if (length > steepest) {
          steepest = length;
          direction = ((Math.atan2(dy, dx) / Math.PI + 1) * DIRECTIONS) % DIRECTIONS;
        }
      }
      const below = Math.floor(direction) % DIRECTIONS;
      const above = (below + 1) % DIRECTIONS;
      const part = direction - Math.floor(direction);
      planes[(below * SIDE + y) * SIDE + x]! += steepest * (1 - part);
      planes[(above * SIDE + y) * SIDE + x]! += steepest * part;
    }
  }
  return planes;
}

/** [3, SIDE, SIDE] moved by (dy, dx); the pixels that come in repeat the edge. */
function shifted(image: Float32Array, dy: number, dx: number): Float32Array {
  const clamp = (value: number) => Math.min(SIDE - 1, Math.max(0, value));
  return image.map((_, index) => {
    const x = index % SIDE;
    const y = Math.floor(index / SIDE) % SIDE;
    const channel = Math.floor(index / (SIDE * SIDE));
    return image[(channel * SIDE + clamp(y - dy)) * SIDE + clamp(x - dx)]!;
  });
}

/** The feature of an L*a*b* picture [3, SIDE, SIDE]. */
function featureOf(lab: Float32Array): Feature {
  const pixels = SIDE * SIDE;
  const background = borderColour(lab);
  const difference = lab.map((value, index) => value - background[Math.floor(index / pixels)]!);
  const outline = new Float32Array(pixels).map((_, p) => {
    const squared = difference[p]! ** 2 + difference[pixels + p]! ** 2 + difference[2 * pixels + p]! ** 2;
    return 1 - Math.exp(-squared / OUTLINE_DIFFERENCE ** 2);
  });
  const edges = poolFields(directionPlanes(lab), EDGE_WINDOWS);
  const total = edges.reduce((sum, value) => sum + value, 0);
  return {
    colour: poolFields(difference, COLOUR_WINDOWS),
    outline: poolFields(outline, COLOUR_WINDOWS),
    // Of unit length after the square root, because the values then add up to one.
    edges: edges.map((value) => (total > 0 ? Math.sqrt(value / total) : 0)),
  };
}

/** The training pictures on one background. */
export interface Library {
  readonly pairs: readonly Pair[];
  readonly features: readonly Feature[];
  /** What a block's squared distance is multiplied by: its weight over the mean between two pictures. */
  readonly scales: Readonly<Record<Block, number>>;
}

/**
 * The features of training pictures on a plain background; about half a second for a thousand.
 * @param set pictures of at least 32 x 32 pixels
 * @param pairs which of them; those that training saw by default
 */
export function buildLibrary(
  set: PictureSet,
  background: Background,
  pairs: readonly Pair[] = trainingPairs(),
): Library {
  const features = pairs.map(({ objectIndex, styleIndex }) => {
    const image = compose(pictureAt(set, objectIndex, styleIndex), background.rgb);
    return featureOf(toLab(areaAverage(image, set.size, set.size)));
  });
  const scale = (block: Block): number => {
    // The mean squared distance of two pictures is twice the variance.
    let variance = 0;
    for (let i = 0; i < features[0]![block].length; i++) {
      const values = features.map((feature) => feature[block][i]!);
      const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
      variance += values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / values.length;
    }
    return BLOCK_WEIGHTS[block] / (2 * variance);
  };
  return { pairs, features, scales: { colour: scale('colour'), outline: scale('outline'), edges: scale('edges') } };
}

function squaredDistance(a: Feature, b: Feature, scales: Library['scales']): number {
  let distance = 0;
  for (const block of BLOCKS) {
    const x = a[block];
    const y = b[block];
    let sum = 0;
    for (let i = 0; i < x.length; i++) sum += (x[i]! - y[i]!) ** 2;
    distance += scales[block] * sum;
  }
  return distance;
}

export interface RankedObject {
  /** Index into `OBJECTS`. */
  readonly objectIndex: number;
  /** The style of the object's nearest picture. */
  readonly styleIndex: number;
  /** The square root of the weighted sum of squared distances. */
  readonly distance: number;
}

/**
 * Every object of the library, the one with the nearest picture first.
 * @param image [3, height, width] in [-1, 1]; values beyond count as their limit
 * @param library made for the background that the prompt named
 */
export function rankObjects(image: Float32Array, height: number, width: number, library: Library): RankedObject[] {
  const lab = toLab(areaAverage(image, height, width));
  const queries = SHIFTS.flatMap((dy) => SHIFTS.map((dx) => featureOf(shifted(lab, dy, dx))));
  const nearest = new Map<number, RankedObject>();
  library.pairs.forEach(({ objectIndex, styleIndex }, index) => {
    const feature = library.features[index]!;
    const distance = Math.sqrt(Math.min(...queries.map((query) => squaredDistance(query, feature, library.scales))));
    if (distance < (nearest.get(objectIndex)?.distance ?? Infinity)) {
      nearest.set(objectIndex, { objectIndex, styleIndex, distance });
    }
  });
  return [...nearest.values()].sort((a, b) => a.distance - b.distance);
}

/** Place of the asked-for object in a ranking, from 1. */
export function rankOf(objectIndex: number, ranking: readonly RankedObject[]): number {
  const place = ranking.findIndex((ranked) => ranked.objectIndex === objectIndex);
  return place < 0 ? Infinity : place + 1;
}
