%% @doc What a save needs from its surroundings: a key, a reservation, a root, and somebody to tell.
%%
%% Two modules are such hosts: {@link erllama_cache_host_erllama}, over the application `erllama',
%% and {@link erllama_cache_store}, built in. The writer calls them in the process that saves:
%%
%% <table>
%% <tr><th>callback</th><th>when</th><th>if it answers an error</th></tr>
%% <tr><td>`identify'</td><td>first, with a slot held</td><td>the save ends with it</td></tr>
%% <tr><td>`reserve'</td><td>next</td><td>the save ends with it; `already_present' is counted</td></tr>
%% <tr><td>`root'</td><td>next</td><td>(it exits)</td></tr>
%% <tr><td>`check'</td><td>of a small file before it is written, of any other between writing and
%%   publishing, and each 15 seconds while a long one is written</td>
%%   <td>the temporary file goes, the reservation is left to whose it is</td></tr>
%% <tr><td>`mark_published', `announce'</td><td>when the file has its name</td>
%%   <td>the file stays</td></tr>
%% <tr><td>`count'</td><td>at the end of a save that went well</td><td>(it answers `ok')</td></tr>
%% <tr><td>`cancel'</td><td>when anything failed after `reserve' and before the file had its name</td>
%%   <td>(it answers `ok')</td></tr>
%% </table>
-module(erllama_cache_host).

-export([lease/0, lease_left/0, renew_every/0]).
-export_type([tier_srv/0, tier/0, identity/0, token/0, event/0]).

-type tier_srv() :: atom().
-type tier() :: disk | ram_file.
-type identity() :: {Key :: <<_:256>>, QuantByte :: byte(), Tokens :: binary()}.
%% The key, the byte that stands for the quant type, the tokens as u32 little-endian each.
-type token() :: reference().
-type event() :: {saved, erllama_cache_meta:save_reason()} | duplicate_dropped.

%% A reservation's lease. It is erllama's, and the built-in store's is the same.
-define(LEASE, 60000).
%% A save asks this often whether its reservation still stands.
-define(RENEW_EVERY, 15000).

%% The key of a save, and what the host makes it from. An error leaves nothing behind.
-callback identify(erllama_cache_meta:complete()) ->
    {ok, identity()} | {error, erllama_cache_meta:invalid()}.

%% Reserves a key for the calling process. `Size' is what the file will take, within some bytes.
-callback reserve(tier_srv(), tier(), Key :: binary(), Size :: non_neg_integer()) ->
    {ok, token()} | {error, already_present | conflict | term()}.

%% The directory to save in. Exits when the tier server is not there.
-callback root(tier_srv()) -> file:name_all().

%% Whether the reservation still stands, and renews its lease of 60 seconds.
-callback check(tier_srv(), Key :: binary(), token()) -> ok | {error, expired}.

%% The file stands in the root, though nobody has been told.
-callback mark_published(tier_srv(), Key :: binary(), token(), Root :: file:name_all()) ->
    ok | {error, expired}.

%% The save is complete. `Size' is the file's in bytes, `Header' its first 48 bytes.
-callback announce(tier_srv(), Key :: binary(), token(), Size :: pos_integer(),
                   Header :: binary(), Tokens :: binary()) ->
    ok | {error, expired}.

%% Gives the reservation up; a stale one too.
-callback cancel(tier_srv(), Key :: binary(), token()) -> ok.

%% Something to be counted has happened.
-callback count(tier_srv(), event()) -> ok.

%% @doc For how many milliseconds a reservation stands that is not renewed.
-spec lease() -> pos_integer().
lease() -> ?LEASE.

%% @doc After so many milliseconds a save renews its reservation.
-spec renew_every() -> pos_integer().
renew_every() -> ?RENEW_EVERY.

%% @doc A host that has just been asked leaves at least so many milliseconds of the lease, and need not
%% renew it while there are: the save asks again before they are over.
-spec lease_left() -> pos_integer().
lease_left() -> ?LEASE - ?RENEW_EVERY.
