/** `npm run sheet`: draws and measures the sheet of the finished model again. */

import { drawSheet } from './sheet.ts';

await drawSheet();
