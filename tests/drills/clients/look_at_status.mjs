// The page of the status in Chromium. Takes its picture, and prints what the browser made of it as one JSON object.
import { chromium } from "playwright-core";

const { CHROMIUM, STATUS, PICTURE, ELSEWHERE } = process.env;
const WIDTHS = [1280, 800, 390];
const browser = await chromium.launch({ executablePath: CHROMIUM });
const page = await browser.newPage({ viewport: { width: WIDTHS[0], height: 720 }, colorScheme: "light" });
const told = { requests: [], failed: [], complaints: [], too_wide: [] };
page.on("request", (request) => told.requests.push(request.url()));
page.on("requestfailed", (request) => told.failed.push(request.url()));
page.on("pageerror", (error) => told.complaints.push(String(error)));
// Also what is no message of a page's own script: what a policy forbids.
const protocol = await page.context().newCDPSession(page);
protocol.on("Log.entryAdded", ({ entry }) => told.complaints.push(entry.text));
await protocol.send("Log.enable");

const answer = await page.goto(STATUS, { waitUntil: "networkidle" });
told.status = answer.status();
told.title = await page.title();
told.rows = await page.locator("tbody tr").evaluateAll((rows) => rows.filter((row) => row.checkVisibility()).map((row) => row.cells[0].innerText));
for (const width of WIDTHS) {
  await page.setViewportSize({ width, height: 720 });
  if (await page.evaluate(() => document.documentElement.scrollWidth > document.documentElement.clientWidth)) told.too_wide.push(width);
}
await page.setViewportSize({ width: WIDTHS[0], height: 720 });
await page.screenshot({ path: PICTURE, fullPage: true });
await page.emulateMedia({ colorScheme: "dark" });
told.dark = await page.evaluate(() => getComputedStyle(document.body).backgroundColor);
await page.emulateMedia({ colorScheme: "light" });
told.light = await page.evaluate(() => getComputedStyle(document.body).backgroundColor);

// Whatever got into the page could load nothing and run nothing, and the browser says so.
const { requests, complaints } = told;
told.requests = [];
told.complaints = [];
await page.evaluate((elsewhere) => {
  const image = document.createElement("img");
  const script = document.createElement("script");
  image.src = elsewhere;
  script.textContent = "document.title = 'taken'";
  document.body.append(image, script);
}, ELSEWHERE);
await page.waitForTimeout(500);
told.forced = { failed: told.failed, complaints: told.complaints.length, title: await page.title() };
Object.assign(told, { requests, complaints });
delete told.failed;
await browser.close();
console.log(JSON.stringify(told));
